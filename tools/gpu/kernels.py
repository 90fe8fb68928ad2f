"""Every kernel's cases, checked against its torch reference on the same device, and timed."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from ...kernels.specs.spec import Case, KernelSpec
from ...kernels.steering.state import Groups
from ...kernels.steering.step import Choice
from ..common.machine_peaks import Roof
from ..common.timing import Clock, Spread
from .report import Report
from .tolerances import difference, of_choices, widened

FUSED, LOOP = "lm_head_steer", "iterate"
"""Kernels that are known by name. The first one's product is the vendor's in the reference too, so that there
is none in float64, and its cases have no weights on a CPU. The second gives scores up to a constant."""
PRODUCT, CUT = "matmul", 1e-4
"""A product by tensor cores, which cut what they add up toward zero, and what that may make of float32."""
LITTLE = 1 << 20
"""Bytes of a case that the interpreter takes at most."""
LOOSE = 1e-3
"""What sixty steps in float32 may be off; they are no part of a decoding step."""


def specs_of(device: torch.device) -> list[KernelSpec]:
    """All of them; for the interpreter the smallest case of each that is small enough."""
    from ...kernels.specs.registry import SPECS  # noqa: PLC0415 - it brings triton, which is told first what it is to do

    if device.type == "cuda":
        return list(SPECS)
    least = [(spec, min(spec.cases, key=lambda case: case.bytes)) for spec in SPECS if spec.name != FUSED]
    return [replace(spec, cases=(case,)) for spec, case in least if case.bytes <= LITTLE]


def check(report: Report, device: torch.device, specs: list[KernelSpec]) -> None:
    """A row a case: the largest error over what is allowed."""
    for spec in specs:
        for case in spec.cases:
            if report.leaves_out("kernels", f"{spec.name}, {case.name}"):
                continue
            with report.part("kernels", f"{spec.name}, {case.name}") as row:
                row["error_share"], row["wrong"] = compared(spec, case, device)


def compared(spec: KernelSpec, case: Case, device: torch.device) -> tuple[float, str]:
    """The kernel's results and what it wrote, beside those of the reference as it is and in float64."""
    ours, rough = made(case, device), made(case, device)
    with poisoned():
        got = spec.launch(*ours)
    single = spec.reference(*rough)
    if isinstance(got, Choice):
        arguments = made(case, device)
        truth = single if spec.name == FUSED else spec.reference(*widened(arguments))
        groups = next(value for value in ours if isinstance(value, Groups))
        return of_choices(got, truth, groups)
    wide = widened(made(case, device))
    exact = spec.reference(*wide)
    if spec.name == LOOP:
        got, single, exact = (scores.log_softmax(-1) for scores in (got, single, exact))
        return difference(got, single, exact, LOOSE)
    results = ((got, *_written(ours)), (single, *_written(rough)), (exact, *_written(wide)))
    return difference(*results, CUT) if spec.name == PRODUCT else difference(*results)


def _written(arguments: tuple[Any, ...]) -> list[Any]:
    """What a kernel may have written into: its tensors."""
    return [value for value in arguments if isinstance(value, torch.Tensor)]


def made(case: Case, device: torch.device) -> tuple[Any, ...]:
    """A case's arguments, always the same."""
    torch.manual_seed(1)
    return case.make(device, torch.Generator().manual_seed(1))


@contextmanager
def poisoned() -> Iterator[None]:
    """New tensors are filled with NaN within."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)


def measure(report: Report, clock: Clock, roof: Roof, specs: list[KernelSpec]) -> None:
    """A row a case: microseconds of the device alone, and with launches, and shares of the roofs."""
    for spec in specs:
        for case in spec.cases:
            if report.leaves_out("bench", f"{spec.name}, {case.name}"):
                continue
            with report.part("bench", f"{spec.name}, {case.name}") as row:
                arguments = made(case, clock.device)
                row["launched_us"] = Spread.of(clock.seconds(lambda: spec.launch(*arguments))).p50  # noqa: B023
                replay = clock.captured(lambda: spec.launch(*arguments))  # noqa: B023
                spread = Spread.of(clock.seconds(replay))
                row.update({"p20_us": spread.p20, "p50_us": spread.p50, "p80_us": spread.p80})
                row["gigabytes_per_second"] = case.bytes / spread.p50 / 1e3
                row["bandwidth_share"] = 1e6 * case.bytes / spread.p50 / roof.bandwidth
                if flops := case.work.flops:
                    row["teraflops"] = flops / spread.p50 / 1e6
                    row["products_share"] = 1e6 * flops / spread.p50 / roof.products
