"""The order of blocks in which threads that went apart meet again."""

from __future__ import annotations

from collections.abc import Sequence

Graph = Sequence[Sequence[int]]


def meeting_order(following: Graph) -> list[int]:
    """A weak topological order of blocks (Bourdoncle 1993) from block 0 on, without what is never reached.

    A block comes after those that lead to it, unless a loop begins with it, and a loop's blocks come before
    what it leads to: if those that are the furthest back always go on, a thread waits where others will come.
    """
    order = list[int]()

    def walk(blocks: frozenset[int]) -> None:
        loops: dict[frozenset[int], list[int]] = {}
        for block in sorted(blocks):
            loops.setdefault(_reached(following, block, blocks), []).append(block)
        for reached in sorted(loops, key=len, reverse=True):  # who leads to another reaches more
            loop = loops[reached]
            order.append(_head(following, loop))
            if len(loop) > 1:
                walk(frozenset(loop) - {order[-1]})

    walk(_reached(following, 0, frozenset(range(len(following)))))
    return order


def _reached(following: Graph, start: int, blocks: frozenset[int]) -> frozenset[int]:
    """The blocks, itself too, that one leads to through some."""
    found, ahead = {start}, [start]
    while ahead:
        for block in following[ahead.pop()]:
            if block in blocks and block not in found:
                found.add(block)
                ahead.append(block)
    return frozenset(found)


def _head(following: Graph, loop: list[int]) -> int:
    """Where a loop is entered from outside."""
    outside = (block for block in range(len(following)) if block not in loop)
    entered = {block for before in outside for block in following[before]} | {0}
    return next((block for block in loop if block in entered), loop[0])
