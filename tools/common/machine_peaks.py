"""Measure a machine's peak memory bandwidth and matrix-multiplication FLOP/s.

A step cannot take less than bytes / bandwidth; with many rows, FLOPs become the limit. Both are measured on
the device and with the threads of the step, because programs do not reach the peaks of data sheets: the
bandwidth by summing float32 numbers that do not fit any cache, or by copying them where that moves more
bytes; FLOP/s by multiplying square matrices with the vendor's library, in the type of the activations.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...kernels.linear.registry import select_format
from .timing import Clock


@dataclass(frozen=True)
class MachinePeaks:
    """bandwidth: bytes per second, read or written. flops: multiplications and additions per second."""

    bandwidth: float
    flops: float


@dataclass(frozen=True)
class BenchSizes:
    """num_bytes: bytes to sum. matrix_size: rows and columns of a matrix. num_trials: timed calls."""

    num_bytes: int
    matrix_size: int
    num_trials: int


BENCH_SIZES = {"cpu": BenchSizes(512 << 20, 2048, 5), "cuda": BenchSizes(1 << 30, 8192, 40)}
"""By device type: several times the largest cache, and large enough that launch overhead is negligible."""


def measure_peaks(dtype: torch.dtype, device: torch.device) -> MachinePeaks:
    """The peaks for a model of `dtype` on `device`: the best of several trials, on a GPU by CUDA events.

    Temporarily allocates half a GiB, on a GPU one and a quarter.
    """
    sizes = BENCH_SIZES[device.type]
    clock = Clock(device, sizes.num_trials)
    bandwidth = _measure_bandwidth(clock, sizes.num_bytes)
    compute_dtype = select_format(dtype, device).compute_dtype
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
