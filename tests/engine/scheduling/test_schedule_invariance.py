"""Random schedules with a model behind them: an answer is what it is alone, whatever goes on beside it."""

from __future__ import annotations

import random
from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
from trimtab.engine import Engine, Request, SamplingParams
from trimtab.engine.sequence.sequence import Group

from ...helpers.invariance_marks import is_steady
from ...helpers.random_requests import SYSTEM, methods
from ...helpers.simulated_kv_cache import check_pages
from ...helpers.tiny_model import at_rest

if TYPE_CHECKING:
    from pathlib import Path

    from trimtab.engine.outputs import Output

QUICK, LONG = 3, 350
"""Schedules for each engine."""
ENGINES: list[dict[str, Any]] = [
    {"enable_prefix_caching": caching, **fields}
    for caching in (True, False)
    for fields in (
        {"max_num_seqs": 9, "max_num_batched_tokens": 9, "spare": 9},
        {"max_num_seqs": 48, "max_num_batched_tokens": 64, "spare": 0},
        {"max_num_seqs": 48, "max_num_batched_tokens": 256, "spare": 300},
    )
]
"""spare: pages beyond those of the largest request."""


def catalogue() -> list[Request]:
    """Requests of all methods, short and long, with common heads, greedy and sampled."""
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
        for at, method in enumerate(methods())
    ]


REQUESTS = catalogue()


@cache
def alone(folder: Path) -> list[Output]:
    """Every request of the catalogue, one after the other, in an engine with room."""
    engine = Engine.from_pretrained(str(folder), kv_cache_memory="8MiB", block_size=16)
    return [engine.generate(request) for request in REQUESTS]


def run(engine: Engine, choose: random.Random) -> tuple[list[tuple[int, Group]], set[int]]:
    """One schedule: requests arrive at any step and some are aborted. All of them, and the ids of those."""
    core = engine._core
    core.looks_ahead = choose.random() < 0.5
    arriving = [choose.randrange(len(REQUESTS)) for _ in range(choose.randint(1, 9))]
    rate, leaving = choose.choice((0.1, 0.5, 1.0)), choose.choice((0.0, 0.02, 0.1))
    groups, aborted = list[tuple[int, Group]](), set[int]()
    for _ in range(5000):
        while arriving and (core.scheduler.idle or choose.random() < rate):
            index = arriving.pop()
            (group,) = core.admit(REQUESTS[index])
            groups.append((index, group))
            core.scheduler.add(group)
        if core.scheduler.idle:
            return groups, aborted
        core.step()
        check_pages(core.scheduler.blocks, core.scheduler.running)
        present = [*core.scheduler.running, *core.scheduler.waiting]
        rows = [group.row for group in present if group.row >= 0]
        assert len(set(rows)) == len(rows), "two requests have one row of the table"
        if present and choose.random() < leaving:
            group = choose.choice(present)
            group.end("abort", "it was left", 0.0)
            core.scheduler.remove(group)
            aborted.add(id(group))
    raise AssertionError("the schedule does not end")


def check(engine: Engine, folder: Path, seed: int) -> None:
    groups, aborted = run(engine, random.Random(seed))
    assert at_rest(engine), seed
    for index, group in groups:
        found, expected = group.output(0.0), alone(folder)[index]
        if id(group) in aborted:
            assert found.token_ids == expected.token_ids[: len(found.token_ids)], (seed, index)
            continue
        assert found.error is None, (seed, index)
        assert (found.token_ids, found.text) == (expected.token_ids, expected.text), (seed, index)
        if is_steady():
            assert found.trace == expected.trace, (seed, index)


def tight(folder: Path, spare: int, **fields: Any) -> Engine:
    """An engine whose cache holds the largest request and `spare` pages more."""
    roomy = Engine.from_pretrained(str(folder), kv_cache_memory="8MiB", block_size=16)._core
    most = max(roomy.scheduler.blocks.most(group) for request in REQUESTS for group in roomy.admit(request))
    page = roomy.runner.cache.pages[:, :, 0].nbytes
    return Engine.from_pretrained(str(folder), kv_cache_memory=(most + spare) * page, block_size=16, **fields)


@pytest.mark.parametrize("fields", ENGINES, ids=str)
def test_a_request_is_the_same_in_any_schedule(fields: dict[str, Any], tiny_folder: Path) -> None:
    engine = tight(tiny_folder, **fields)
    for seed in range(QUICK):
        check(engine, tiny_folder, seed)


@pytest.mark.long
@pytest.mark.parametrize("fields", ENGINES, ids=str)
def test_a_request_is_the_same_in_thousands_of_schedules(fields: dict[str, Any], tiny_folder: Path) -> None:
    engine = tight(tiny_folder, **fields)
    for seed in range(QUICK, LONG):
        check(engine, tiny_folder, seed)
    print(f"{LONG - QUICK} schedules, {engine._core.scheduler.preemptions} preemptions")
