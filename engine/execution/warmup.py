"""All kernels that requests may need, launched before the first comes: what a launch compiles stalls all.

A kernel has variants by what a step's requests have, and none by how many they are: numbers of rows, of
branches, objectives and tokens are not compiled in. The steps are the runner's own, on the cache's spare page
and with a table that is not the requests', so that nothing of them stays.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from itertools import product
from typing import TYPE_CHECKING

from ...kernels.attention_metadata import Segment
from ...kernels.backend import PAIR
from ...kernels.reference.paged_kv_cache import DeviceKV
from ...kernels.steering.coefficients import Program
from ...kernels.steering.state import Draw, SteerTable
from .step_input import Admitted, Order

if TYPE_CHECKING:
    from .model_runner import Runner

LOG = logging.getLogger("trimtab.engine")
Shape = tuple[int, int]
"""Requests of a step, and branches of the first of them; the others have one."""
REPORTS = ((False, False), (True, False), (False, True))
"""A trace, and the likeliest tokens; a step with both launches what one with a trace does."""
OFF_ON = (False, True)
GREEDY, FILTERED = Draw(), Draw(1.0, min_p=0.1)


def warm_up(runner: Runner, shapes: Sequence[Shape]) -> None:
    """Launches all of them; compiles that come after are late. In every process of an engine alike.

    shapes: see `Backend.warm_shapes`; in steps of the first the vocabulary's product stands alone, but for
    plain ones, which the last is for.
    """
    cache, table, seconds = runner.cache, runner.table, runner.steer_seconds
    assert isinstance(cache, DeviceKV), "only such a cache has a spare page"
    LOG.info("launching every kernel once; what Triton's cache does not hold is compiled")
    start = time.perf_counter()
    runner.table = SteerTable(table.vocab, table.device, table.shard)
    try:
        for order in orders(cache.spare, *shapes):
            runner.follow(order)
    finally:
        runner.table, runner.steer_seconds = table, seconds
    compiles, took = runner.compiles, time.perf_counter() - start
    if compiles:
        compiles.expect_none()
        LOG.info("every kernel was launched in %.1f seconds, and %d were made ready", took, compiles.count)


def orders(page: int, apart: Shape, *fused: Shape) -> Iterator[Order]:
    """Steps over that page alone that launch each variant of each kernel.

    The first switches are those of the score kernel. Other kernels have fewer, and of their own a delay,
    rewards and the kind of filter, each of which comes and goes with a switch that its kernel does not have.
    The next are those of the kernels at both ends of a step whose product is fused with its steering, and the
    last those of the product itself.
    """
    yield Order(scored=[0, 0])  # whose cache is small: AMD's compiler knows tensors below 2 GiB
    yield _order(page, PAIR, _program(), tokens=2)  # a prompt; the others are steps that may be replayed
    for limited, masked, edited, filtered in product(OFF_ON, repeat=4):
        program = _program(limited, masked, rewarded=edited)
        draw = Draw(1.0, 2 * limited, 0.9 if masked else 1.0, 0.1) if filtered else GREEDY
        for report in REPORTS:
            yield _order(page, apart, program, draw, report, edited)
    for limited, rewarded, draw in product(OFF_ON, OFF_ON, (GREEDY, FILTERED)):
        for report in REPORTS:
            yield _order(page, PAIR, _program(limited, rewarded=rewarded), draw, report)
    for shape in fused:
        for rewarded, draw in product(OFF_ON, (GREEDY, FILTERED)):
            yield _order(page, shape, _program(rewarded=rewarded), draw)
        yield _order(page, shape, _program(), report=(True, False))
        yield _order(page, shape, _program(limited=True))


def _program(limited: bool = False, masked: bool = False, rewarded: bool = False) -> Program:
    return Program(
        scale=1.0,
        delay=float(masked),
        mask_top_p=0.9 if masked else 1.0,
        reward=float(rewarded),
        kl_budget=0.1 if limited else float("inf"),
    )


def _order(
    page: int,
    shape: Shape,
    program: Program,
    draw: Draw = GREEDY,
    report: tuple[bool, bool] = (False, False),
    edited: bool = False,
    tokens: int = 1,
) -> Order:
    """A step in which the first request has this program and draw, and its first branch so many tokens."""
    requests, branches = shape
    others = list(range(1, requests))
    rows = branches + len(others)
    return Order(
        admitted=[
            Admitted(0, program, [1.0] * (branches - 1), draw),
            *(Admitted(row, Program(scale=1.0), [], GREEDY) for row in others),
        ],
        segments=[Segment(0, tokens, [page]), *[Segment(0, 1, [page])] * (rows - 1)],
        token_ids=[0] * (rows + tokens - 1),
        turned_by=[1] * (rows + tokens - 1),
        last=[row + tokens - 1 for row in range(rows)],
        groups=[(0, list(range(branches))), *((row, [0]) for row in others)],
        bias=[(0, 0, 0.0)] if edited else [],
        trace=report[0],
        top=report[1],
    )
