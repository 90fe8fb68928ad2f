"""Order of basic blocks in which diverged threads reconverge."""

from __future__ import annotations

from collections.abc import Sequence

Graph = Sequence[Sequence[int]]


def reconvergence_order(successors: Graph) -> list[int]:
    """Weak topological order of the blocks reachable from block 0 (Bourdoncle 1993).

    A block comes after its predecessors, except for the back edges to a loop head, and the blocks of a loop
    come before its successors. If the threads with the lowest block always run first, the others wait where
    those will arrive.
    """
    order = list[int]()

    def visit(blocks: frozenset[int]) -> None:
        components: dict[frozenset[int], list[int]] = {}
        for block in sorted(blocks):
            components.setdefault(_reachable(successors, block, blocks), []).append(block)
        for component in sorted(components, key=len, reverse=True):  # predecessors reach more blocks
            members = components[component]
            order.append(_loop_head(successors, members))
            if len(members) > 1:
                visit(frozenset(members) - {order[-1]})

    visit(_reachable(successors, 0, frozenset(range(len(successors)))))
    return order


def _reachable(successors: Graph, start: int, blocks: frozenset[int]) -> frozenset[int]:
    """The blocks reachable from `start` within `blocks`, including `start`."""
    visited, stack = {start}, [start]
    while stack:
        for block in successors[stack.pop()]:
            if block in blocks and block not in visited:
                visited.add(block)
                stack.append(block)
    return frozenset(visited)


def _loop_head(successors: Graph, loop: list[int]) -> int:
    """The block of a loop that is entered from outside."""
    outside_blocks = (block for block in range(len(successors)) if block not in loop)
    entry_blocks = {block for predecessor in outside_blocks for block in successors[predecessor]} | {0}
    return next((block for block in loop if block in entry_blocks), loop[0])
