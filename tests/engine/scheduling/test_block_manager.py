"""Pages of the KV cache: reserved whole, shared by common heads, forgotten oldest first, and never lost."""

from __future__ import annotations

from copy import deepcopy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trimtab.engine.scheduling.block_manager import KVBlocks
from trimtab.engine.sequence.sequence import Group

from ...helpers.simulated_kv_cache import check_pages
from ...helpers.tiny_model import group_of

tokens = st.lists(st.integers(1, 2), max_size=5)


@st.composite
def groups(draw: st.DrawFn) -> Group:
    """One to four branches that open with a common head; some are alike, some are all head."""
    head = draw(st.lists(st.integers(1, 2), min_size=1, max_size=14))
    tails = draw(st.lists(tokens, min_size=1, max_size=4))
    return group_of([head + tail for tail in tails], limit=draw(st.integers(1, 9)))


def compute(blocks: KVBlocks, group: Group) -> bool:
    """Everything of a group, branch by branch, as if steps had done it."""
    for branch in group.branches:
        assert blocks.match(group, branch, set())
        count = group.waiting(branch)
        if not blocks.reserve([(branch, count)]):
            return False
        blocks.commit(group, branch, count)
    return True


@settings(deadline=None)
@given(groups(), st.integers(1, 5))
def test_a_reservation_takes_all_pages_or_none(group: Group, size: int) -> None:
    shares = [(branch, group.waiting(branch)) for branch in group.branches]
    needed = sum(-(-count // size) for _, count in shares)
    short = KVBlocks(needed - 1, size)
    assert not short.reserve(shares)
    assert short.free == needed - 1
    assert all(not branch.pages and branch.computed == 0 for branch in group.branches)
    enough = KVBlocks(needed, size)
    assert enough.reserve(shares)
    assert enough.free == 0
    check_pages(enough, [group])


@settings(deadline=None)
@given(groups(), st.integers(1, 5))
def test_a_group_alone_takes_the_pages_that_were_said_to_be_needed(group: Group, size: int) -> None:
    """But for a page that one branch ends with and another goes on from, which is not counted on."""
    needed = KVBlocks(1, size).needed(group)
    blocks = KVBlocks(needed, size)
    assert compute(blocks, group)
    ends = sum(len(branch.prompt_token_ids) % size == 0 for branch in group.branches)
    assert blocks.free <= ends
    check_pages(blocks, [group])


@pytest.mark.parametrize("caching", [True, False])
@settings(deadline=None)
@given(
    size=st.integers(1, 5),
    total=st.integers(1, 40),
    steps=st.lists(st.tuples(st.integers(0, 2), groups()), max_size=15),
)
def test_pages_are_never_held_twice_nor_lost(
    caching: bool, size: int, total: int, steps: list[tuple[int, Group]]
) -> None:
    blocks, held = KVBlocks(total, size, caching), list[Group]()
    for what, wanted in steps:
        group = deepcopy(wanted)
        if what == 0 and held:
            blocks.release(held.pop(len(group.branches) % len(held)))
        elif what == 1:
            before = [branch.pages for one in held for branch in one.branches]
            new = {one: other for pair in blocks.compact(held) for one, other in (pair, pair[::-1])}
            after = [branch.pages for one in held for branch in one.branches]
            assert after == [[new.get(page, page) for page in table] for table in before]
        elif compute(blocks, group):
            held.append(group)
        else:
            blocks.release(group)
        check_pages(blocks, held)
    while held:
        blocks.release(held.pop())
        check_pages(blocks, held)
    assert blocks.free == total
    assert caching or len(blocks._empty) == total


def test_identical_prompts_share_all_but_the_page_of_the_last_token() -> None:
    blocks = KVBlocks(100, 4)
    group = group_of([[1] * 9, [1] * 9, [1] * 8], limit=1)
    assert compute(blocks, group)
    lead, twin, shorter = (branch.pages for branch in group.branches)
    assert (len(lead), blocks.free) == (3, 100 - 3 - 1 - 1)
    assert twin[:2] == lead[:2]
    assert shorter[:1] == lead[:1]
    assert twin[2] != lead[2]
    assert shorter[1] != lead[1]


def test_the_last_token_of_an_answer_needs_no_place() -> None:
    blocks = KVBlocks(9, 4)
    assert blocks.most(group_of([[1, 2, 3]], limit=2)) == 1
    assert blocks.most(group_of([[1, 2, 3]], limit=3)) == 2


def test_releasing_twice_frees_once() -> None:
    blocks = KVBlocks(9, 4)
    first, second = group_of([[1, 2, 3]], limit=2), group_of([[1, 2, 3]], limit=2)
    assert compute(blocks, first)
    assert compute(blocks, second)
    blocks.release(first)
    blocks.release(first)
    assert blocks.free == 8
    check_pages(blocks, [second])


def test_the_next_turn_finds_the_prompt_and_the_answer_of_the_last() -> None:
    blocks = KVBlocks(9, 4)
    first = group_of([[1, 2, 3, 4, 5, 6]], limit=9)
    first.tokens += [7, 8, 9]
    assert compute(blocks, first)
    blocks.release(first)
    second = group_of([[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]], limit=1)
    assert blocks.match(second, second.branches[0], set())
    assert second.branches[0].computed == 8


def test_the_same_tokens_after_other_ones_are_another_page() -> None:
    blocks = KVBlocks(9, 2)
    first, second = group_of([[1, 1, 2, 2, 3]], limit=1), group_of([[5, 5, 2, 2, 3]], limit=1)
    assert compute(blocks, first)
    assert blocks.match(second, second.branches[0], set())
    assert second.branches[0].computed == 0


def test_the_page_used_longest_ago_is_forgotten_first_and_ends_before_beginnings() -> None:
    blocks = KVBlocks(4, 2)
    old, young = group_of([[1, 1, 2, 2, 0]], limit=1), group_of([[3, 3, 0]], limit=1)
    for group in (old, young):
        assert compute(blocks, group)
        blocks.release(group)
    assert compute(blocks, group_of([[9, 9, 8]], limit=1))
    for prompt, found in (([1, 1, 2, 2, 0], 2), ([3, 3, 0], 2)):
        again = group_of([prompt], limit=1)
        blocks.match(again, again.branches[0], set())
        assert again.branches[0].computed == found, prompt


def test_pages_in_use_are_brought_to_the_beginning_when_they_are_sparse() -> None:
    blocks = KVBlocks(64, 2)
    many = [group_of([[n, n, n]], limit=1) for n in range(20)]
    for group in many:
        assert compute(blocks, group)
    for group in many[:-1]:
        blocks.release(group)
    assert blocks.compact([many[-1]])
    assert sorted(many[-1].branches[0].pages) == [0, 1]
    check_pages(blocks, [many[-1]])
    again = group_of([[0, 0, 5]], limit=1)
    blocks.match(again, again.branches[0], set())
    assert again.branches[0].computed == 2, "what was kept is still found after it has moved"


def test_where_pages_need_not_be_dense_none_moves() -> None:
    blocks = KVBlocks(64, 2, dense=False)
    first, last = (group_of([[n, n, n]], limit=1) for n in range(2))
    assert compute(blocks, first)
    assert compute(blocks, last)
    pages = list(last.branches[0].pages)
    blocks.release(first)
    assert blocks.compact([last]) == []
    assert last.branches[0].pages == pages
