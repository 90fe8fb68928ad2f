from __future__ import annotations

from collections import Counter
from copy import deepcopy

from hypothesis import given, settings
from hypothesis import strategies as st
from trimtab.engine.blocks import KVBlocks
from trimtab.engine.group import Group

from ..tiny import group_of

tokens = st.lists(st.integers(1, 2), max_size=5)


@st.composite
def groups(draw: st.DrawFn) -> Group:
    """One to four branches that open with a common head; some are alike, some are all head."""
    head = draw(st.lists(st.integers(1, 2), min_size=1, max_size=14))
    tails = draw(st.lists(tokens, min_size=1, max_size=4))
    return group_of([head + tail for tail in tails], limit=draw(st.integers(1, 9)))


def common(a: list[int], b: list[int]) -> int:
    same = [x == y for x, y in zip(a, b, strict=False)]
    return same.index(False) if False in same else len(same)


def check(blocks: KVBlocks, held: list[Group]) -> None:
    """Every page is free or held, its count is that of the tables it stands in, and only a head is shared."""
    tables = [branch.pages for group in held for branch in group.branches]
    holders = Counter(page for table in tables for page in table)
    assert holders == blocks._holders
    assert sorted([*blocks._free, *holders]) == list(range(blocks.total))
    assert blocks.free == blocks.total - len(holders)
    for table in tables:
        assert len(set(table)) == len(table)
    for group in held:
        lead, size = group.branches[0], blocks.block_size
        for branch in group.branches:
            whole = len(branch.prompt_token_ids) + group.limit - 1
            assert len(branch.pages) * size >= whole > (len(branch.pages) - 1) * size
            if branch is lead:
                shareable = 0
            else:
                head = common(branch.prompt_token_ids, lead.prompt_token_ids)
                shareable = (
                    min(head, len(branch.prompt_token_ids) - 1, len(lead.prompt_token_ids) - 1) // size
                )
            assert branch.shared == shareable * size
            assert branch.shared < len(branch.prompt_token_ids)
            assert branch.pages[:shareable] == lead.pages[:shareable]
            elsewhere = Counter(page for table in tables if table is not branch.pages for page in table)
            own = branch.pages[shareable:] if branch is not lead else []
            assert not any(elsewhere[page] for page in own)


@settings(deadline=None)
@given(st.integers(1, 5), st.integers(1, 40), st.lists(st.tuples(st.booleans(), groups()), max_size=12))
def test_pages_are_never_held_twice_nor_lost(size: int, total: int, steps: list[tuple[bool, Group]]) -> None:
    blocks, held = KVBlocks(total, size), list[Group]()
    for releases, group in steps:
        if releases and held:
            blocks.release(held.pop(len(group.branches) % len(held)))
        else:
            before, needed = blocks.free, blocks.needed(group)
            branches = [deepcopy(vars(branch)) for branch in group.branches]
            if blocks.reserve(group):
                held.append(group)
                assert before - blocks.free == needed
                assert all(branch.computed == branch.shared for branch in group.branches)
            else:
                assert needed > before == blocks.free
                assert [vars(branch) for branch in group.branches] == branches
        check(blocks, held)
    while held:
        blocks.release(held.pop())
        check(blocks, held)
    assert blocks.free == total


@settings(deadline=None)
@given(groups(), st.integers(1, 5))
def test_a_reservation_takes_all_pages_or_none(group: Group, size: int) -> None:
    needed = KVBlocks(1, size).needed(group)
    assert KVBlocks(needed, size).reserve(deepcopy(group))
    short = KVBlocks(needed - 1, size)
    assert not short.reserve(group)
    assert short.free == needed - 1
    assert all(not branch.pages and branch.computed == 0 for branch in group.branches)


def test_identical_prompts_share_all_but_the_page_of_the_last_token() -> None:
    blocks = KVBlocks(100, 4)
    group = group_of([[1] * 9, [1] * 9, [1] * 8], limit=1)
    assert blocks.reserve(group)
    lead, twin, shorter = group.branches
    assert (twin.shared, shorter.shared) == (8, 4)
    assert (len(lead.pages), blocks.free) == (3, 100 - 3 - 1 - 1)
    assert twin.pages[:2] == lead.pages[:2]


def test_the_last_token_of_an_answer_needs_no_place() -> None:
    blocks = KVBlocks(9, 4)
    assert blocks.needed(group_of([[1, 2, 3]], limit=2)) == 1
    assert blocks.needed(group_of([[1, 2, 3]], limit=3)) == 2


def test_releasing_twice_frees_once() -> None:
    blocks = KVBlocks(9, 4)
    first, second = group_of([[1, 2, 3]], limit=2), group_of([[1, 2, 3]], limit=2)
    assert blocks.reserve(first)
    assert blocks.reserve(second)
    blocks.release(first)
    blocks.release(first)
    assert blocks.free == 8
    check(blocks, [second])
