"""The two roofs of a machine, measured: how fast it reads memory, and how fast it multiplies.

A decoding step reads every weight once, and the keys and values of every row. It cannot be faster than the
memory delivers those bytes: bytes / bandwidth is its least time. With many rows the products become the lower
roof. Both are measured where the step runs and with its threads, since data sheets promise what no program
sees: the bandwidth by summing float32 numbers that no cache holds, which on a CPU is as fast as copying them
and reads only; the products by squaring a matrix of 2048 rows in the type that activations have.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from ...kernels.linear import arithmetic_dtype
from ...models import work

if TYPE_CHECKING:
    from collections.abc import Callable

    from ...engine.engine import Engine

READ = 512 << 20
"""Bytes that are summed: sixteen times the largest cache of common machines."""
ROWS = 2048
TRIES = 5


@dataclass(frozen=True)
class Roof:
    """bandwidth: bytes a second that are read. products: multiplications and additions a second."""

    bandwidth: float
    products: float


def measured(dtype: torch.dtype, device: torch.device) -> Roof:
    """The roofs for a model of that type on that device; the best of some tries, half a GiB for a moment."""
    numbers = torch.ones(READ // 4, device=device)
    reading = _least(numbers.sum, device)
    matrix = torch.ones(ROWS, ROWS, dtype=arithmetic_dtype(dtype, device), device=device)
    multiplying = _least(lambda: matrix @ matrix, device)
    return Roof(READ / reading, 2 * ROWS**3 / multiplying)


def weight_bytes(engine: Engine) -> float:
    """What a step must read of the weights, each once, in the engine's type."""
    return work.weight_bytes(engine.model_config, engine._core.runner.model.dtype.itemsize)


def kv_bytes(engine: Engine, rows: int, tokens: float) -> float:
    """The keys and values that a step of `rows` branches reads, each with `tokens` tokens before it."""
    itemsize = engine._core.runner.cache.pages.dtype.itemsize
    return work.kv_bytes(engine.model_config, rows, tokens, itemsize)


def step_work(engine: Engine, rows: int) -> float:
    """Multiplications and additions of a step's products with the weights, without attention."""
    found = work.decoding(engine.model_config, rows, 1, engine._core.runner.model.dtype.itemsize)
    return sum(part.flops for part in found if part.stage in work.PRODUCTS)


def _least(call: Callable[[], Any], device: torch.device) -> float:
    """Seconds of the fastest of some calls, after one that warms up."""
    found = []
    for _ in range(TRIES + 1):
        start = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - start)
    return min(found[1:])
