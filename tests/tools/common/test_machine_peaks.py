"""The roofs of a machine: which calls are timed, and what is made of their times."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from trimtab.kernels.cpu.linear import arithmetic_dtype
from trimtab.tools.common import machine_peaks

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("times", [(0.5, 2.0, 1.0), (2.0, 0.5, 1.0)])
def test_the_fastest_call_of_each_kind_is_the_roof(
    dtype: torch.dtype, times: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    results, asked = [], []

    class Clock:
        def __init__(self, device: torch.device, tries: int) -> None:
            self.device = device
            asked.append((device, tries))

        def seconds(self, call: Callable[[], Any]) -> list[float]:
            results.append(call())
            return [3.0, times[len(results) - 1], 4.0]

    monkeypatch.setattr(machine_peaks, "Clock", Clock)
    monkeypatch.setitem(machine_peaks.SIZES, "cpu", machine_peaks.Sizes(read=1 << 12, side=16, tries=3))
    found = machine_peaks.measured(dtype, CPU)
    assert asked == [(CPU, 3)]
    assert found == machine_peaks.Roof(bandwidth=(1 << 12) / 0.5, products=2 * 16**3 / 1.0)
    total, copied, product = results
    assert total == (1 << 12) // 4
    assert len(copied) == (1 << 12) // 8, "as many bytes are read as are written"
    assert (product.shape, product.dtype) == ((16, 16), arithmetic_dtype(dtype, CPU))


def test_what_is_measured_is_a_speed_that_machines_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(machine_peaks.SIZES, "cpu", machine_peaks.Sizes(read=1 << 20, side=64, tries=5))
    found = machine_peaks.measured(torch.float32, CPU)
    assert 1e6 < found.bandwidth < 1e14
    assert 1e6 < found.products < 1e16
