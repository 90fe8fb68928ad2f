"""Scheduler: order of service, chunked prefill and preemption without effect on answers."""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trimtab.engine import Amulet, Base, Engine, Mato, Objective, Opad, Request, SamplingParams
from trimtab.engine.sampling_params import NO_TOKEN_LIMIT
from trimtab.engine.scheduling.block_manager import BlockManager
from trimtab.engine.scheduling.scheduler import Scheduler
from trimtab.engine.sequence.sequence import SequenceGroup
from trimtab.kernels.common.errors import InputError

from ...harness import get_runner, get_scheduler
from ...helpers.invariance_marks import batch_invariant_cpu
from ...helpers.simulated_kv_cache import SimulatedKVCache
from ...helpers.tiny_model import is_idle, make_group
from .test_block_manager import random_groups

if TYPE_CHECKING:
    from pathlib import Path

KIND, SHORT = Objective("Be kind and true."), Objective("Be short.", 2)
MAX_BRANCHES = 5


@pytest.mark.parametrize("caching", [True, False])
@settings(deadline=None, max_examples=150)
@given(
    arrivals=st.lists(random_groups(), min_size=1, max_size=7),
    size=st.integers(1, 4),
    budget=st.integers(MAX_BRANCHES, 13),
    spare=st.integers(0, 20),
    random=st.randoms(use_true_random=False),
)
def test_every_group_is_admitted_in_order_and_finishes(
    caching: bool, arrivals: list[SequenceGroup], size: int, budget: int, spare: int, random: st.Random
) -> None:
    """Random arrivals, aborts, shared prefixes and tiny pools; all invariants are checked at every step."""
    arrivals = [deepcopy(group) for group in arrivals]
    max_blocks = max(BlockManager(1, size).max_blocks(group) for group in arrivals)
    scheduler = Scheduler(BlockManager(max_blocks + spare, size, caching), MAX_BRANCHES, budget)
    cache = SimulatedKVCache(scheduler)
    arriving, admitted, aborted = list(arrivals), list[SequenceGroup](), list[SequenceGroup]()
    for _ in range(3000):
        if arriving and (scheduler.idle or random.random() < 0.5):
            scheduler.add(arriving.pop(0))
        if scheduler.idle and not arriving:
            break
        plan = cache.step()
        admitted += plan.new_groups
        rows = [group.state_row for group in (*scheduler.running, *scheduler.waiting) if group.state_row >= 0]
        assert len(set(rows)) == len(rows)
        assert plan.scheduled, "a step without tokens would repeat forever"
        for group in plan.to_sample:
            group.output_ids.append(random.randint(1, 2))
            if len(group.output_ids) == group.max_new_tokens:
                scheduler.remove(group)
        if random.random() < 0.05 and (present := [*scheduler.running, *scheduler.waiting]):
            aborted.append(random.choice(present))
            scheduler.remove(aborted[-1])
    assert scheduler.idle
    assert not arriving
    assert scheduler.block_manager.num_free_blocks == scheduler.block_manager.num_blocks
    order = [next(i for i, group in enumerate(arrivals) if group is one) for one in admitted]
    assert order == sorted(order)
    gone = {id(group) for group in aborted}
    assert all(len(group.output_ids) == group.max_new_tokens for group in arrivals if id(group) not in gone)


def run_to_end(scheduler: Scheduler) -> SimulatedKVCache:
    """Run all groups to their end."""
    cache = SimulatedKVCache(scheduler)
    while not scheduler.idle:
        for group in cache.step().to_sample:
            group.output_ids.append(1)
            if len(group.output_ids) == group.max_new_tokens:
                scheduler.remove(group)
    return cache


def test_a_large_group_is_not_overtaken_by_small_ones() -> None:
    scheduler = Scheduler(BlockManager(11, 4), 5, 64)
    first, large, small = make_group([[1] * 21], 4), make_group([[2] * 20, [3] * 20], 4), make_group([[4]], 1)
    for group in (first, large, small):
        scheduler.add(group)
    assert scheduler.schedule().new_groups == [first]
    assert scheduler.schedule().new_groups == []
    scheduler.remove(first)
    assert scheduler.schedule().new_groups == [large]
    scheduler.remove(large)
    assert scheduler.schedule().new_groups == [small]


def test_groups_that_decode_are_served_before_prompts() -> None:
    scheduler = Scheduler(BlockManager(100, 4), 5, 6)
    cache = SimulatedKVCache(scheduler)
    old, new = make_group([[1] * 5], 9), make_group([[2] * 30], 9)
    scheduler.add(old)
    cache.step()
    old.output_ids.append(1)
    scheduler.add(new)
    plan = cache.step()
    assert [(group is old, count) for group, _, count in plan.scheduled] == [(True, 1), (False, 5)]
    assert plan.to_sample == [old]


def test_a_short_prompt_starts_within_two_steps_of_a_long_one() -> None:
    scheduler = Scheduler(BlockManager(200, 64), 48, 2048)
    cache = SimulatedKVCache(scheduler)
    long, short = make_group([[1] * 4000], 9), make_group([[2] * 50, [3] * 60, [4] * 70], 9)
    scheduler.add(long)
    cache.step()
    scheduler.add(short)
    assert cache.step().to_sample == [short]


def test_a_prompt_common_to_all_branches_of_all_requests_is_computed_once() -> None:
    scheduler = Scheduler(BlockManager(2000, 16), 96, 512)
    head = list(range(1000))
    for request in range(32):
        scheduler.add(make_group([head + [2000 + 3 * request + branch] * 20 for branch in range(3)], 8))
    cache = run_to_end(scheduler)
    num_shared = 1000 // 16 * 16
    assert cache.num_computed == num_shared + 96 * (1020 - num_shared + 7)


def test_the_youngest_group_is_preempted_when_blocks_run_out_and_resumes() -> None:
    scheduler = Scheduler(BlockManager(8, 4), 5, 64)
    old, young = make_group([[1] * 8], 17), make_group([[2] * 8], 17)
    scheduler.add(old)
    scheduler.add(young)
    run_to_end(scheduler)
    assert scheduler.preemptions == 1
    assert [len(group.output_ids) for group in (old, young)] == [17, 17]


def test_a_preempted_group_keeps_its_state_row() -> None:
    scheduler = Scheduler(BlockManager(8, 4), 5, 64)
    cache = SimulatedKVCache(scheduler)
    groups = [make_group([[n] * 8], 17) for n in range(2)]
    for group in groups:
        scheduler.add(group)
    while not scheduler.preemptions:
        for group in cache.step().to_sample:
            group.output_ids.append(1)
    assert [group.state_row for group in groups] == [0, 1]
    scheduler.remove(groups[0])
    scheduler.add(make_group([[7]], 2))
    cache.step()
    assert groups[1].state_row == 1


def test_removing_an_unknown_group_changes_nothing() -> None:
    scheduler = Scheduler(BlockManager(100, 4), 5, 6)
    first, second = make_group([[1] * 5], 9), make_group([[1] * 5], 9)
    scheduler.add(first)
    scheduler.schedule()
    scheduler.remove(second)
    assert scheduler.running == [first]
    scheduler.remove(first)
    scheduler.remove(first)
    assert scheduler.idle
    assert scheduler.block_manager.num_free_blocks == 100


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
        {"enable_prefix_caching": False},
    ],
    ids=str,
)
@batch_invariant_cpu
def test_answers_are_bit_identical_for_any_prefill_chunks_and_block_usage(
    fields: dict[str, int], tiny_folder: Path, tiny: Engine
) -> None:
    """Chunked prefill, waiting, preemption (which computes the last token of a request twice)."""
    expected = tiny.generate(MIXED)
    engine = Engine.from_pretrained(str(tiny_folder), **{"kv_cache_memory": "4MiB", **fields})
    for _ in range(2):  # the second time from the prefix cache, if enabled
        outputs = engine.generate(MIXED)
        assert [output.error for output in outputs] == [None] * 3
        assert [output.token_ids for output in outputs] == [output.token_ids for output in expected]
        assert [output.trace for output in outputs] == [output.trace for output in expected]
        assert is_idle(engine)


@pytest.mark.parametrize(
    "fields",
    [{"block_size": 16}, {"block_size": 48}, {"block_size": 128, "kv_cache_memory": "400KiB"}],
    ids=str,
)
def test_tokens_do_not_depend_on_the_block_size(
    fields: dict[str, int], tiny_folder: Path, tiny: Engine
) -> None:
    expected = tiny.generate(MIXED)
    engine = Engine.from_pretrained(str(tiny_folder), **{"kv_cache_memory": "4MiB", **fields})
    outputs = engine.generate(MIXED)
    assert [output.error for output in outputs] == [None] * 3
    assert [output.token_ids for output in outputs] == [output.token_ids for output in expected]
    assert is_idle(engine)


def test_requests_wait_until_there_is_room_and_all_are_answered(tiny_folder: Path, tiny: Engine) -> None:
    # a block has 16 tokens in 4096 bytes; the largest request needs most of the cache
    engine = Engine.from_pretrained(str(tiny_folder), kv_cache_memory="88KiB", max_num_seqs=3, block_size=16)
    requests = MIXED * 3
    outputs = engine.generate(requests)
    assert [o.token_ids for o in outputs] == [o.token_ids for o in tiny.generate(requests)]
    assert outputs[-1].timings.queue > outputs[0].timings.queue
    assert is_idle(engine)


@pytest.mark.parametrize("caching", [True, False])
@batch_invariant_cpu
def test_a_preempted_request_resumes_bit_identically(caching: bool, tiny_folder: Path, tiny: Engine) -> None:
    """Weights, rewards, OPAD's previous contrast, the random stream and the trace survive."""
    sampling = SamplingParams(max_tokens=60, ignore_eos=True, temperature=0.8, top_p=0.9, seed=3)
    methods = (Mato([KIND, SHORT]), Opad([KIND]), Mato([SHORT, KIND], accumulate="mean", kl_budget=0.5))
    requests = [Request("Why do cats purr?", method, sampling) for method in methods]
    engine = Engine.from_pretrained(
        str(tiny_folder), kv_cache_memory="140KiB", block_size=16, enable_prefix_caching=caching
    )
    roomy = Engine.from_pretrained(str(tiny_folder), kv_cache_memory="4MiB", block_size=16)
    outputs = engine.generate(requests)
    assert get_scheduler(engine).preemptions > 0
    for output, expected in zip(outputs, roomy.generate(requests), strict=True):
        assert output.error is None
        assert (output.token_ids, output.trace) == (expected.token_ids, expected.trace)
    assert is_idle(engine)


def test_the_next_turn_of_a_conversation_computes_only_what_is_new(tiny_folder: Path) -> None:
    engine = Engine.from_pretrained(str(tiny_folder), kv_cache_memory="4MiB", block_size=16)
    sampling = SamplingParams(max_tokens=33, ignore_eos=True)
    first = engine.generate(Request(branch_token_ids=[[7] * 40], sampling=sampling))
    computed: list[int] = []
    forward = get_runner(engine).model.forward
    get_runner(engine).model.forward = lambda ids, *more: computed.append(len(ids)) or forward(ids, *more)  # type: ignore[method-assign, func-returns-value]
    longer = [[7] * 40 + first.token_ids + [8] * 9]
    engine.generate(Request(branch_token_ids=longer, sampling=SamplingParams(max_tokens=1)))
    assert sum(computed) == 40 + 33 + 9 - 72 // 16 * 16


def test_a_request_that_can_never_fit_the_cache_is_refused_with_its_numbers(tiny_folder: Path) -> None:
    engine = Engine.from_pretrained(str(tiny_folder), kv_cache_memory="12KiB", block_size=16)  # 3 blocks
    ids = [5] * 30
    with pytest.raises(
        InputError,
        match=r"needs 4 blocks of 16 tokens for an answer of 20, and the KV cache has 3; "
        r"lower max_tokens to at most 19, or raise kv_cache_memory",
    ) as refused:
        engine.generate(Request(branch_token_ids=[ids], sampling=SamplingParams(max_tokens=20)))
    assert refused.value.field == "max_tokens"
    with pytest.raises(InputError, match="the KV cache has 3; shorten the prompt, or raise kv_cache_memory"):
        engine.generate(
            Request(branch_token_ids=[[5] * 60], sampling=SamplingParams(max_tokens=NO_TOKEN_LIMIT))
        )
    output = engine.generate(Request(branch_token_ids=[ids], sampling=SamplingParams(max_tokens=19)))
    assert len(output.token_ids) in range(1, 20)
    assert is_idle(engine)


def test_an_answer_without_a_limit_ends_where_the_cache_ends(tiny_folder: Path) -> None:
    engine = Engine.from_pretrained(str(tiny_folder), kv_cache_memory="24KiB", block_size=16)  # 6 blocks
    unlimited = SamplingParams(max_tokens=NO_TOKEN_LIMIT, ignore_eos=True)
    output = engine.generate(
        Request(
            branch_token_ids=[[5] * 20, [6] * 20, [7] * 9], steering=Mato([KIND, SHORT]), sampling=unlimited
        )
    )
    assert (output.finish_reason, len(output.token_ids)) == ("length", 32 + 1 - 20)
    assert is_idle(engine)


def test_a_request_of_more_branches_than_run_at_once_is_refused_with_both_numbers(tiny_folder: Path) -> None:
    engine = Engine.from_pretrained(str(tiny_folder), kv_cache_memory="1MiB", max_num_seqs=2)
    steering = Mato([KIND, SHORT])
    with pytest.raises(InputError, match="the request has 3 branches; max_num_seqs allows 2 at once"):
        engine.generate(Request("Why?", steering))
    assert engine.generate(Request("Why?", Base(), SamplingParams(max_tokens=2))).token_ids


def test_a_prompt_longer_than_the_context_is_refused_with_its_length(tiny_folder: Path) -> None:
    engine = Engine.from_pretrained(str(tiny_folder), kv_cache_memory="1MiB", max_model_len=60)
    with pytest.raises(InputError, match=r"branch 'base' has 60 tokens; .* max_model_len, which is 60"):
        engine.generate(Request(branch_token_ids=[[5] * 60]))
    long = Objective("Be kind. " * 30)
    with pytest.raises(InputError, match=r"branch 'Be kind\..* tokens; .* max_model_len, which is 60"):
        engine.generate(Request("Why?", Amulet([long])))
