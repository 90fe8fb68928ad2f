"""The order of blocks in which threads that went apart meet again."""

from __future__ import annotations

from collections.abc import Sequence

Graph = Sequence[Sequence[int]]


def reconvergence_order(successors: Graph) -> list[int]:
    """A weak topological order of blocks (Bourdoncle 1993) from block 0 on, without what is never reached.

    A block comes after those that lead to it, unless a loop begins with it, and a loop's blocks come before
    what it leads to: if those that are the furthest back always go on, a thread waits where others will come.
    """
    order = list[int]()

    def visit(blocks: frozenset[int]) -> None:
        components: dict[frozenset[int], list[int]] = {}
        for block in sorted(blocks):
            components.setdefault(_reachable(successors, block, blocks), []).append(block)
        for component in sorted(components, key=len, reverse=True):  # who leads to another reaches more
            members = components[component]
            order.append(_loop_head(successors, members))
            if len(members) > 1:
                visit(frozenset(members) - {order[-1]})

    visit(_reachable(successors, 0, frozenset(range(len(successors)))))
    return order


def _reachable(successors: Graph, start: int, blocks: frozenset[int]) -> frozenset[int]:
    """The blocks, itself too, that one leads to through some."""
    visited, stack = {start}, [start]
    while stack:
        for block in successors[stack.pop()]:
            if block in blocks and block not in visited:
                visited.add(block)
                stack.append(block)
    return frozenset(visited)


def _loop_head(successors: Graph, loop: list[int]) -> int:
    """Where a loop is entered from outside."""
    outside_blocks = (block for block in range(len(successors)) if block not in loop)
    entry_blocks = {block for predecessor in outside_blocks for block in successors[predecessor]} | {0}
    return next((block for block in loop if block in entry_blocks), loop[0])
