"""Block manager: all-or-nothing allocation, prefix sharing, LRU eviction, and no lost blocks."""

from __future__ import annotations

from copy import deepcopy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trimtab.engine.scheduling.block_manager import BlockManager
from trimtab.engine.sequence.sequence import SequenceGroup

from ...helpers.simulated_kv_cache import check_blocks
from ...helpers.tiny_model import make_group

tokens = st.lists(st.integers(1, 2), max_size=5)


@st.composite
def random_groups(draw: st.DrawFn) -> SequenceGroup:
    """One to four branches with a common prefix; some are identical, some are only the prefix."""
    head = draw(st.lists(st.integers(1, 2), min_size=1, max_size=14))
    tails = draw(st.lists(tokens, min_size=1, max_size=4))
    return make_group([head + tail for tail in tails], max_new_tokens=draw(st.integers(1, 9)))


def compute_all(block_manager: BlockManager, group: SequenceGroup) -> bool:
    """Compute all tokens of a group, branch by branch, as steps would."""
    for branch in group.branches:
        assert block_manager.take_cached(group, branch, set())
        count = group.num_uncomputed(branch)
        if not block_manager.allocate([(branch, count)]):
            return False
        block_manager.cache_full_blocks(group, branch, count)
    return True


@settings(deadline=None)
@given(random_groups(), st.integers(1, 5))
def test_an_allocation_takes_all_blocks_or_none(group: SequenceGroup, size: int) -> None:
    shares = [(branch, group.num_uncomputed(branch)) for branch in group.branches]
    needed = sum(-(-count // size) for _, count in shares)
    short = BlockManager(needed - 1, size)
    assert not short.allocate(shares)
    assert short.num_free_blocks == needed - 1
    assert all(not branch.block_table and branch.num_computed_tokens == 0 for branch in group.branches)
    enough = BlockManager(needed, size)
    assert enough.allocate(shares)
    assert enough.num_free_blocks == 0
    check_blocks(enough, [group])


@settings(deadline=None)
@given(random_groups(), st.integers(1, 5))
def test_a_group_alone_takes_the_predicted_number_of_blocks(group: SequenceGroup, size: int) -> None:
    """Except for a block that ends one branch and continues another, which is not predicted as shared."""
    needed = BlockManager(1, size).blocks_needed(group)
    block_manager = BlockManager(needed, size)
    assert compute_all(block_manager, group)
    ends = sum(len(branch.prompt_token_ids) % size == 0 for branch in group.branches)
    assert block_manager.num_free_blocks <= ends
    check_blocks(block_manager, [group])


@pytest.mark.parametrize("caching", [True, False])
@settings(deadline=None)
@given(
    size=st.integers(1, 5),
    total=st.integers(1, 40),
    steps=st.lists(st.tuples(st.integers(0, 2), random_groups()), max_size=15),
)
def test_blocks_are_never_allocated_twice_nor_lost(
    caching: bool, size: int, total: int, steps: list[tuple[int, SequenceGroup]]
) -> None:
    block_manager, groups = BlockManager(total, size, caching), list[SequenceGroup]()
    for action, new_group in steps:
        group = deepcopy(new_group)
        if action == 0 and groups:
            block_manager.free(groups.pop(len(group.branches) % len(groups)))
        elif action == 1:
            before = [branch.block_table for one in groups for branch in one.branches]
            new = {
                one: other for pair in block_manager.defragment(groups) for one, other in (pair, pair[::-1])
            }
            after = [branch.block_table for one in groups for branch in one.branches]
            assert after == [[new.get(block, block) for block in table] for table in before]
        elif compute_all(block_manager, group):
            groups.append(group)
        else:
            block_manager.free(group)
        check_blocks(block_manager, groups)
    while groups:
        block_manager.free(groups.pop())
        check_blocks(block_manager, groups)
    assert block_manager.num_free_blocks == total
    assert caching or len(block_manager._free_heap) == total


def test_identical_prompts_share_all_but_the_block_of_the_last_token() -> None:
    block_manager = BlockManager(100, 4)
    group = make_group([[1] * 9, [1] * 9, [1] * 8], max_new_tokens=1)
    assert compute_all(block_manager, group)
    lead, twin, shorter = (branch.block_table for branch in group.branches)
    assert (len(lead), block_manager.num_free_blocks) == (3, 100 - 3 - 1 - 1)
    assert twin[:2] == lead[:2]
    assert shorter[:1] == lead[:1]
    assert twin[2] != lead[2]
    assert shorter[1] != lead[1]


def test_the_last_token_of_an_answer_needs_no_slot() -> None:
    block_manager = BlockManager(9, 4)
    assert block_manager.max_blocks(make_group([[1, 2, 3]], max_new_tokens=2)) == 1
    assert block_manager.max_blocks(make_group([[1, 2, 3]], max_new_tokens=3)) == 2


def test_freeing_a_group_twice_frees_its_blocks_once() -> None:
    block_manager = BlockManager(9, 4)
    first, second = make_group([[1, 2, 3]], max_new_tokens=2), make_group([[1, 2, 3]], max_new_tokens=2)
    assert compute_all(block_manager, first)
    assert compute_all(block_manager, second)
    block_manager.free(first)
    block_manager.free(first)
    assert block_manager.num_free_blocks == 8
    check_blocks(block_manager, [second])


def test_the_next_turn_reuses_the_cached_prompt_and_answer() -> None:
    block_manager = BlockManager(9, 4)
    first = make_group([[1, 2, 3, 4, 5, 6]], max_new_tokens=9)
    first.output_ids += [7, 8, 9]
    assert compute_all(block_manager, first)
    block_manager.free(first)
    second = make_group([[1, 2, 3, 4, 5, 6, 7, 8, 9, 10]], max_new_tokens=1)
    assert block_manager.take_cached(second, second.branches[0], set())
    assert second.branches[0].num_computed_tokens == 8


def test_the_same_tokens_after_a_different_prefix_are_another_block() -> None:
    block_manager = BlockManager(9, 2)
    first, second = (
        make_group([[1, 1, 2, 2, 3]], max_new_tokens=1),
        make_group([[5, 5, 2, 2, 3]], max_new_tokens=1),
    )
    assert compute_all(block_manager, first)
    assert block_manager.take_cached(second, second.branches[0], set())
    assert second.branches[0].num_computed_tokens == 0


def test_the_least_recently_used_block_is_evicted_first_and_ends_before_beginnings() -> None:
    block_manager = BlockManager(4, 2)
    old, young = make_group([[1, 1, 2, 2, 0]], max_new_tokens=1), make_group([[3, 3, 0]], max_new_tokens=1)
    for group in (old, young):
        assert compute_all(block_manager, group)
        block_manager.free(group)
    assert compute_all(block_manager, make_group([[9, 9, 8]], max_new_tokens=1))
    for prompt, num_cached in (([1, 1, 2, 2, 0], 2), ([3, 3, 0], 2)):
        again = make_group([prompt], max_new_tokens=1)
        block_manager.take_cached(again, again.branches[0], set())
        assert again.branches[0].num_computed_tokens == num_cached, prompt


def test_sparse_blocks_are_moved_to_the_beginning() -> None:
    block_manager = BlockManager(64, 2)
    many = [make_group([[n, n, n]], max_new_tokens=1) for n in range(20)]
    for group in many:
        assert compute_all(block_manager, group)
    for group in many[:-1]:
        block_manager.free(group)
    assert block_manager.defragment([many[-1]])
    assert sorted(many[-1].branches[0].block_table) == [0, 1]
    check_blocks(block_manager, [many[-1]])
    again = make_group([[0, 0, 5]], max_new_tokens=1)
    block_manager.take_cached(again, again.branches[0], set())
    assert again.branches[0].num_computed_tokens == 2, "a moved block stays cached"


def test_no_block_moves_with_keep_dense_off() -> None:
    block_manager = BlockManager(64, 2, keep_dense=False)
    first, last = (make_group([[n, n, n]], max_new_tokens=1) for n in range(2))
    assert compute_all(block_manager, first)
    assert compute_all(block_manager, last)
    blocks = list(last.branches[0].block_table)
    block_manager.free(first)
    assert block_manager.defragment([last]) == []
    assert last.branches[0].block_table == blocks
