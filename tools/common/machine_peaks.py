"""The two roofs of a machine, measured: how fast it reads memory, and how fast it multiplies.

A step that reads so many bytes cannot be faster than the memory delivers them: bytes / bandwidth is its least
time. With many rows the products become the lower roof. Both are measured where the step runs and with its
threads, since data sheets promise what no program sees: the bandwidth by summing float32 numbers that no
cache holds, or by copying them where that moves more; the products by multiplying square matrices by the
vendor's library, in the type that activations have.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...kernels.cpu.linear import arithmetic_dtype
from .timing import Clock


@dataclass(frozen=True)
class Roof:
    """bandwidth: bytes a second, read or written. products: multiplications and additions a second."""

    bandwidth: float
    products: float


@dataclass(frozen=True)
class Sizes:
    """read: bytes that are summed. side: rows and columns of a matrix. tries: calls that are timed."""

    read: int
    side: int
    tries: int


SIZES = {"cpu": Sizes(512 << 20, 2048, 5), "cuda": Sizes(1 << 30, 8192, 40)}
"""By the device's type: several times the largest cache, and large enough that a launch does not count."""


def measured(dtype: torch.dtype, device: torch.device) -> Roof:
    """The roofs for a model of that type on that device: the best of some tries. On a GPU they are timed by
    its own events. Takes half a GiB for a moment, on a GPU one and a quarter."""
    sizes = SIZES[device.type]
    clock = Clock(device, sizes.tries)
    bandwidth = _bandwidth(clock, sizes.read)
    kind = arithmetic_dtype(dtype, device)
    left, right = (torch.randn(sizes.side, sizes.side, device=device).to(kind) for _ in range(2))
    multiplying = min(clock.seconds(lambda: left @ right))
    return Roof(bandwidth, 2 * sizes.side**3 / multiplying)


def _bandwidth(clock: Clock, size: int) -> float:
    numbers = torch.ones(size // 4, device=clock.device)
    half = len(numbers) // 2
    reading = clock.seconds(numbers.sum)
    copying = clock.seconds(lambda: numbers[:half].copy_(numbers[half:]))
    return size / min(reading + copying)
