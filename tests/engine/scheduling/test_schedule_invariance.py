"""Random schedules with a tiny model: an answer does not depend on concurrent requests."""

from __future__ import annotations

import random
from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
from trimtab.engine import Engine, Request, SamplingParams
from trimtab.engine.sequence.sequence import SequenceGroup

from ...harness import get_core, get_scheduler
from ...helpers.invariance_marks import is_batch_invariant
from ...helpers.random_requests import SYSTEM, all_methods
from ...helpers.simulated_kv_cache import check_blocks
from ...helpers.tiny_model import is_idle

if TYPE_CHECKING:
    from pathlib import Path

    from trimtab.engine.outputs import Output

QUICK_SCHEDULES, LONG_SCHEDULES = 3, 350
"""Number of schedules per engine."""
ENGINES: list[dict[str, Any]] = [
    {"enable_prefix_caching": caching, **fields}
    for caching in (True, False)
    for fields in (
        {"max_num_seqs": 9, "max_num_batched_tokens": 9, "spare_blocks": 9},
        {"max_num_seqs": 48, "max_num_batched_tokens": 64, "spare_blocks": 0},
        {"max_num_seqs": 48, "max_num_batched_tokens": 256, "spare_blocks": 300},
    )
]
"""spare_blocks: blocks beyond those of the largest request."""


def make_requests() -> list[Request]:
    """Requests of all methods, short and long, with common prefixes, greedy and sampled."""
    asks: list[Any] = [
        "Why?",
        "What happens if an earthworm is cut in half? " * 2,
        [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "Is it kind?"}],
        [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "naïve café 東京 " * 3}],
    ]
    samplings = [
        SamplingParams(max_tokens=50, ignore_eos=True),
        SamplingParams(max_tokens=5),
        SamplingParams(max_tokens=14, temperature=0.9, top_p=0.8, seed=7),
        SamplingParams(max_tokens=7, temperature=1.3, min_p=0.02, repetition_penalty=1.2, seed=8),
    ]
    return [
        Request(asks[(at + turn) % 4], method, samplings[(at // 4 + at + 2 * turn) % 4])
        for turn in range(2)
        for at, method in enumerate(all_methods())
    ]


REQUESTS = make_requests()


@cache
def answers_alone(folder: Path) -> list[Output]:
    """Outputs of REQUESTS, each run alone in an engine with a large KV cache."""
    engine = Engine.from_pretrained(str(folder), kv_cache_memory="8MiB", block_size=16)
    return [engine.generate(request) for request in REQUESTS]


def run_schedule(engine: Engine, rng: random.Random) -> tuple[list[tuple[int, SequenceGroup]], set[int]]:
    """Run one schedule with random arrivals and aborts; return all groups and the ids of aborted ones."""
    core = get_core(engine)
    core.async_scheduling = rng.random() < 0.5
    arrivals = [rng.randrange(len(REQUESTS)) for _ in range(rng.randint(1, 9))]
    rate, abort_rate = rng.choice((0.1, 0.5, 1.0)), rng.choice((0.0, 0.02, 0.1))
    groups, aborted = list[tuple[int, SequenceGroup]](), set[int]()
    for _ in range(5000):
        while arrivals and (core.scheduler.idle or rng.random() < rate):
            index = arrivals.pop()
            (group,) = core.create_groups(REQUESTS[index])
            groups.append((index, group))
            core.scheduler.add(group)
        if core.scheduler.idle:
            return groups, aborted
        core.step()
        check_blocks(core.scheduler.block_manager, core.scheduler.running)
        unfinished = [*core.scheduler.running, *core.scheduler.waiting]
        rows = [group.state_row for group in unfinished if group.state_row >= 0]
        assert len(set(rows)) == len(rows), "two groups share a state row"
        if unfinished and rng.random() < abort_rate:
            group = rng.choice(unfinished)
            group.end("abort", "aborted", 0.0)
            core.scheduler.remove(group)
            aborted.add(id(group))
    raise AssertionError("the schedule does not end")


def check_schedule(engine: Engine, folder: Path, seed: int) -> None:
    groups, aborted = run_schedule(engine, random.Random(seed))
    assert is_idle(engine), seed
    for index, group in groups:
        output, expected = group.make_output(0.0), answers_alone(folder)[index]
        if id(group) in aborted:
            assert output.token_ids == expected.token_ids[: len(output.token_ids)], (seed, index)
            continue
        assert output.error is None, (seed, index)
        assert (output.token_ids, output.text) == (expected.token_ids, expected.text), (seed, index)
        if is_batch_invariant():
            assert output.trace == expected.trace, (seed, index)


def tight_engine(folder: Path, spare_blocks: int, **fields: Any) -> Engine:
    """An engine whose KV cache fits the largest request and `spare_blocks` more blocks."""
    roomy_core = get_core(Engine.from_pretrained(str(folder), kv_cache_memory="8MiB", block_size=16))
    max_blocks = max(
        roomy_core.scheduler.block_manager.max_blocks(group)
        for request in REQUESTS
        for group in roomy_core.create_groups(request)
    )
    block_bytes = roomy_core.runner.cache.blocks[:, :, 0].nbytes
    return Engine.from_pretrained(
        str(folder), kv_cache_memory=(max_blocks + spare_blocks) * block_bytes, block_size=16, **fields
    )


@pytest.mark.parametrize("fields", ENGINES, ids=str)
def test_a_request_is_the_same_in_any_schedule(fields: dict[str, Any], tiny_folder: Path) -> None:
    engine = tight_engine(tiny_folder, **fields)
    for seed in range(QUICK_SCHEDULES):
        check_schedule(engine, tiny_folder, seed)


@pytest.mark.long
@pytest.mark.parametrize("fields", ENGINES, ids=str)
def test_a_request_is_the_same_in_hundreds_of_schedules(fields: dict[str, Any], tiny_folder: Path) -> None:
    engine = tight_engine(tiny_folder, **fields)
    for seed in range(QUICK_SCHEDULES, LONG_SCHEDULES):
        check_schedule(engine, tiny_folder, seed)
    print(f"{LONG_SCHEDULES - QUICK_SCHEDULES} schedules, {get_scheduler(engine).preemptions} preemptions")
