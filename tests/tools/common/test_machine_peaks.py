"""Measured peaks of a machine: which calls are timed, and how the peaks follow from their times."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from trimtab.kernels.linear.registry import select_format
from trimtab.tools.common import machine_peaks

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("times", [(0.5, 2.0, 1.0), (2.0, 0.5, 1.0)])
def test_the_fastest_call_gives_the_peak(
    dtype: torch.dtype, times: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    results, calls = [], []

    class Clock:
        def __init__(self, device: torch.device, tries: int) -> None:
            self.device = device
            calls.append((device, tries))

        def seconds(self, call: Callable[[], Any]) -> list[float]:
            results.append(call())
            return [3.0, times[len(results) - 1], 4.0]

    monkeypatch.setattr(machine_peaks, "Clock", Clock)
    monkeypatch.setitem(
        machine_peaks.BENCH_SIZES,
        "cpu",
        machine_peaks.BenchSizes(num_bytes=1 << 12, matrix_size=16, num_trials=3),
    )
    peaks = machine_peaks.measure_peaks(dtype, CPU)
    assert calls == [(CPU, 3)]
    assert peaks == machine_peaks.MachinePeaks(bandwidth=(1 << 12) / 0.5, flops=2 * 16**3 / 1.0)
    total, copied, product = results
    assert total == (1 << 12) // 4
    assert len(copied) == (1 << 12) // 8, "half of the bytes are read, half are written"
    assert (product.shape, product.dtype) == ((16, 16), select_format(dtype, CPU).compute_dtype)


def test_measured_peaks_are_plausible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(
        machine_peaks.BENCH_SIZES,
        "cpu",
        machine_peaks.BenchSizes(num_bytes=1 << 20, matrix_size=64, num_trials=5),
    )
    peaks = machine_peaks.measure_peaks(torch.float32, CPU)
    assert 1e6 < peaks.bandwidth < 1e14
    assert 1e6 < peaks.flops < 1e16
