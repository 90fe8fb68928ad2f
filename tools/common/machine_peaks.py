"""Two peaks of a machine, measured: how fast it reads memory, and how fast it multiplies.

A step that reads so many bytes cannot be faster than the memory delivers them: bytes / bandwidth is its least
time. With many rows the products become the lower roof. Both are measured where the step runs and with its
threads, since data sheets promise what no program sees: the bandwidth by summing float32 numbers that no
cache holds, or by copying them where that moves more; the products by multiplying square matrices by the
vendor's library, in the type that activations have.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...kernels.cpu.linear import get_compute_dtype
from .timing import Clock


@dataclass(frozen=True)
class MachinePeaks:
    """bandwidth: bytes a second, read or written. flops: multiplications and additions a second."""

    bandwidth: float
    flops: float


@dataclass(frozen=True)
class BenchSizes:
    """read: bytes that are summed. matrix_size: rows and columns of a matrix. num_trials: calls that are
    timed.
    """

    num_bytes: int
    matrix_size: int
    num_trials: int


BENCH_SIZES = {"cpu": BenchSizes(512 << 20, 2048, 5), "cuda": BenchSizes(1 << 30, 8192, 40)}
"""By the device's type: several times the largest cache, and large enough that a launch does not count."""


def measure_peaks(dtype: torch.dtype, device: torch.device) -> MachinePeaks:
    """The roofs for a model of that type on that device: the best of some tries. On a GPU they are timed by
    its own events. Takes half a GiB for a moment, on a GPU one and a quarter."""
    sizes = BENCH_SIZES[device.type]
    clock = Clock(device, sizes.num_trials)
    bandwidth = _measure_bandwidth(clock, sizes.num_bytes)
    compute_dtype = get_compute_dtype(dtype, device)
    a, b = (
        torch.randn(sizes.matrix_size, sizes.matrix_size, device=device).to(compute_dtype) for _ in range(2)
    )
    matmul_time = min(clock.seconds(lambda: a @ b))
    return MachinePeaks(bandwidth, 2 * sizes.matrix_size**3 / matmul_time)


def _measure_bandwidth(clock: Clock, num_bytes: int) -> float:
    numbers = torch.ones(num_bytes // 4, device=clock.device)
    half = len(numbers) // 2
    read_times = clock.seconds(numbers.sum)
    copy_times = clock.seconds(lambda: numbers[:half].copy_(numbers[half:]))
    return num_bytes / min(read_times + copy_times)
