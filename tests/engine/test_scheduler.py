from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trimtab.engine import Amulet, Base, Engine, Mato, Objective, Request, SamplingParams
from trimtab.engine.blocks import KVBlocks
from trimtab.engine.group import Group
from trimtab.engine.scheduler import Scheduler
from trimtab.kernels.errors import InputError

from ..tiny import at_rest, group_of
from .test_blocks import check, groups

if TYPE_CHECKING:
    from pathlib import Path

    from trimtab.engine.scheduler import Plan

KIND, SHORT = Objective("Be kind and true."), Objective("Be short.", 2)
ROWS = 5


def take(scheduler: Scheduler, plan: Plan) -> None:
    """Does what a plan says, and checks that it may be done."""
    assert sum(count for _, _, count in plan.shares) <= scheduler.max_tokens
    assert all(count > 0 for _, _, count in plan.shares)
    shares = {id(branch): count for _, branch, count in plan.shares}
    assert len(shares) == len(plan.shares)
    for group, branch, count in plan.shares:
        assert any(group is running for running in scheduler.running)
        lead = group.branches[0]
        assert lead.computed + shares.get(id(lead), 0) >= branch.shared
        assert len(group.uncomputed(branch, count)) == count
    for _, branch, count in plan.shares:
        branch.computed += count
    for group in scheduler.running:
        for branch in group.branches:
            assert branch.computed <= len(branch.prompt_token_ids) + len(group.tokens)
            assert branch.computed <= len(branch.pages) * scheduler.blocks.block_size
        caught_up = all(group.waiting(branch) == 0 for branch in group.branches)
        assert caught_up == any(group is ready for ready in plan.ready)


def check_places(scheduler: Scheduler) -> None:
    """Running branches hold different slots and groups different rows, within the limit."""
    slots = [branch.slot for group in scheduler.running for branch in group.branches]
    rows = [group.row for group in scheduler.running]
    assert len(set(slots)) == len(slots)
    assert len(set(rows)) == len(rows)
    assert all(0 <= place < scheduler.max_rows for place in slots + rows)


@settings(deadline=None)
@given(
    st.lists(groups(), min_size=1, max_size=7),
    st.integers(1, 4),
    st.integers(ROWS, 13),
    st.integers(0, 20),
    st.randoms(use_true_random=False),
)
def test_every_group_is_admitted_in_order_and_finishes(
    asked: list[Group], size: int, budget: int, spare: int, random: st.Random
) -> None:
    most = max(KVBlocks(1, size).needed(group) for group in asked)
    scheduler = Scheduler(KVBlocks(most + spare, size), ROWS, budget)
    arriving, admitted, aborted = list(asked), list[Group](), list[Group]()
    for _ in range(2000):
        if arriving and (scheduler.idle or random.random() < 0.5):
            scheduler.add(arriving.pop(0))
        if scheduler.idle and not arriving:
            break
        plan = scheduler.plan()
        admitted += plan.admitted
        check_places(scheduler)
        check(scheduler.blocks, scheduler.running)
        assert plan.shares, "a step that computes nothing would be repeated for ever"
        take(scheduler, plan)
        for group in plan.ready:
            group.tokens.append(1)
            if len(group.tokens) == group.limit:
                scheduler.remove(group)
        if random.random() < 0.05 and (present := [*scheduler.running, *scheduler.waiting]):
            aborted.append(random.choice(present))
            scheduler.remove(aborted[-1])
    assert scheduler.idle
    assert not arriving
    assert scheduler.blocks.free == scheduler.blocks.total
    order = [next(i for i, group in enumerate(asked) if group is one) for one in admitted]
    assert order == sorted(order)
    gone = {id(group) for group in aborted}
    assert all(len(group.tokens) == group.limit for group in asked if id(group) not in gone)


def test_a_large_group_is_not_overtaken_by_small_ones() -> None:
    scheduler = Scheduler(KVBlocks(10, 4), 5, 64)
    first, large, small = group_of([[1] * 20], 4), group_of([[1] * 20, [2] * 20], 4), group_of([[1]], 1)
    for group in (first, large, small):
        scheduler.add(group)
    assert scheduler.plan().admitted == [first]
    assert scheduler.plan().admitted == []
    scheduler.remove(first)
    assert scheduler.plan().admitted == []  # twelve pages are needed, and there are only ten
    scheduler.remove(large)
    assert scheduler.plan().admitted == [small]


def test_groups_that_decode_are_served_before_prompts() -> None:
    scheduler = Scheduler(KVBlocks(100, 4), 5, 6)
    old, new = group_of([[1] * 5], 9), group_of([[2] * 30], 9)
    scheduler.add(old)
    take(scheduler, scheduler.plan())
    old.tokens.append(1)
    scheduler.add(new)
    plan = scheduler.plan()
    assert [(group is old, count) for group, _, count in plan.shares] == [(True, 1), (False, 5)]
    assert plan.ready == [old]


def test_removing_a_group_that_is_gone_changes_nothing() -> None:
    scheduler = Scheduler(KVBlocks(100, 4), 5, 6)
    first, second = group_of([[1] * 5], 9), group_of([[1] * 5], 9)
    scheduler.add(first)
    scheduler.plan()
    scheduler.remove(second)
    assert scheduler.running == [first]
    scheduler.remove(first)
    scheduler.remove(first)
    assert scheduler.idle
    assert scheduler.blocks.free == 100


MIXED = [
    Request(
        "What happens if an earthworm is cut in half?", Mato([KIND, SHORT]), SamplingParams(max_tokens=20)
    ),
    Request("Why?", sampling=SamplingParams(max_tokens=20)),
    Request("naïve " * 20, Amulet([KIND]), SamplingParams(max_tokens=20, temperature=1.0, seed=4)),
]


@pytest.mark.parametrize(
    "fields",
    [
        {"max_num_batched_tokens": 4, "max_num_seqs": 4},
        {"max_num_batched_tokens": 17, "max_num_seqs": 6},
        {"max_num_batched_tokens": 64, "max_num_seqs": 3},
        {"block_size": 1},
        {"block_size": 7},
        {"block_size": 100, "kv_cache_memory": "150KiB"},
    ],
    ids=str,
)
def test_tokens_do_not_depend_on_how_prompts_are_cut_or_paged(
    fields: dict[str, int], tiny_folder: Path, tiny: Engine
) -> None:
    whole = tiny.generate(MIXED)
    engine = Engine.from_pretrained(str(tiny_folder), **{"kv_cache_memory": "4MiB", **fields})
    outputs = engine.generate(MIXED)
    assert [output.error for output in outputs] == [None] * 3
    assert [output.token_ids for output in outputs] == [output.token_ids for output in whole]
    assert at_rest(engine)


def test_requests_wait_until_there_is_room_and_all_are_answered(tiny_folder: Path, tiny: Engine) -> None:
    # a page holds 16 tokens and takes 3072 bytes; the largest request needs most of the cache
    engine = Engine.from_pretrained(str(tiny_folder), kv_cache_memory="64KiB", max_num_seqs=3)
    requests = MIXED * 3
    outputs = engine.generate(requests)
    assert [o.token_ids for o in outputs] == [o.token_ids for o in tiny.generate(requests)]
    assert outputs[-1].timings.queue > outputs[0].timings.queue
    assert at_rest(engine)


def test_a_request_that_can_never_fit_the_cache_is_refused_with_its_numbers(tiny_folder: Path) -> None:
    engine = Engine.from_pretrained(str(tiny_folder), kv_cache_memory="9216")  # three pages of 3072 bytes
    ids = [5] * 30
    with pytest.raises(
        InputError,
        match=r"needs 4 pages of 16 tokens, and the KV cache has 3; raise kv_cache_memory or lower",
    ):
        engine.generate(Request(branch_token_ids=[ids], sampling=SamplingParams(max_tokens=20)))
    output = engine.generate(Request(branch_token_ids=[ids], sampling=SamplingParams(max_tokens=19)))
    assert len(output.token_ids) in range(1, 20)
    assert at_rest(engine)


def test_a_request_of_more_branches_than_run_at_once_is_refused_with_both_numbers(tiny_folder: Path) -> None:
    engine = Engine.from_pretrained(str(tiny_folder), kv_cache_memory="1MiB", max_num_seqs=2)
    steering = Mato([KIND, SHORT])
    with pytest.raises(InputError, match="the request has 3 branches; max_num_seqs allows 2 at once"):
        engine.generate(Request("Why?", steering))
    assert engine.generate(Request("Why?", Base(), SamplingParams(max_tokens=2))).token_ids


def test_a_prompt_longer_than_the_context_is_refused_with_its_length(tiny_folder: Path) -> None:
    engine = Engine.from_pretrained(str(tiny_folder), kv_cache_memory="1MiB", max_model_len=40)
    with pytest.raises(InputError, match=r"branch 'base' has 40 tokens; .* max_model_len, which is 40"):
        engine.generate(Request(branch_token_ids=[[5] * 40]))
    long = Objective("Be kind. " * 30)
    with pytest.raises(InputError, match=r"branch 'Be kind\..* tokens; .* max_model_len, which is 40"):
        engine.generate(Request("Why?", Amulet([long])))
