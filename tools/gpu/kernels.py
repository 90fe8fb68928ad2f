"""Every kernel's cases, checked against its torch reference on the same device, and timed."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from ...kernels.specs.spec import KernelCase, KernelSpec
from ...kernels.steering.layout import RequestLayout
from ...kernels.steering.step import SamplerOutput
from ..common.machine_peaks import MachinePeaks
from ..common.timing import Clock, TimeSpread
from .report import CheckReport
from .tolerances import compare_sampler_outputs, compare_tensors, to_float64

FUSED_KERNEL, LOOP_KERNEL = "lm_head_steer", "iterate"
"""Kernels that are known by name. The first one's product is the vendor's in the reference too, so that there
is none in float64, and its cases have no weights on a CPU. The second gives scores up to a constant."""
MATMUL_KERNEL, MATMUL_ATOL = "matmul", 1e-4
"""A product by tensor cores, which cut what they add up toward zero, and what that may make of float32."""
MAX_INTERPRETED_BYTES = 1 << 20
"""Bytes of a case that the interpreter takes at most."""
LOOP_ATOL = 1e-3
"""What sixty steps in float32 may be off; they are no part of a decoding step."""


def select_specs(device: torch.device) -> list[KernelSpec]:
    """All of them; for the interpreter the smallest case of each that is small enough."""
    from ...kernels.specs.registry import SPECS  # noqa: PLC0415 - it brings triton, which is told first what it is to do

    if device.type == "cuda":
        return list(SPECS)
    smallest = [
        (spec, min(spec.cases, key=lambda case: case.bytes)) for spec in SPECS if spec.name != FUSED_KERNEL
    ]
    return [replace(spec, cases=(case,)) for spec, case in smallest if case.bytes <= MAX_INTERPRETED_BYTES]


def check_kernels(report: CheckReport, device: torch.device, specs: list[KernelSpec]) -> None:
    """A row a case: the largest error over what is allowed."""
    for spec in specs:
        for case in spec.cases:
            if report.should_skip("kernels", f"{spec.name}, {case.name}"):
                continue
            with report.record("kernels", f"{spec.name}, {case.name}") as row:
                row["error_share"], row["wrong"] = compare_kernel(spec, case, device)


def compare_kernel(spec: KernelSpec, case: KernelCase, device: torch.device) -> tuple[float, str]:
    """The kernel's results and what it wrote, beside those of the reference as it is and in float64."""
    kernel_args, reference_args = make_args(case, device), make_args(case, device)
    with poison_new_tensors():
        actual = spec.launch(*kernel_args)
    reference = spec.reference(*reference_args)
    if isinstance(actual, SamplerOutput):
        case_args = make_args(case, device)
        expected = reference if spec.name == FUSED_KERNEL else spec.reference(*to_float64(case_args))
        layout = next(value for value in kernel_args if isinstance(value, RequestLayout))
        return compare_sampler_outputs(actual, expected, layout)
    wide_args = to_float64(make_args(case, device))
    exact_result = spec.reference(*wide_args)
    if spec.name == LOOP_KERNEL:
        actual, reference, exact_result = (
            scores.log_softmax(-1) for scores in (actual, reference, exact_result)
        )
        return compare_tensors(actual, reference, exact_result, LOOP_ATOL)
    results = (
        (actual, *_output_tensors(kernel_args)),
        (reference, *_output_tensors(reference_args)),
        (exact_result, *_output_tensors(wide_args)),
    )
    return compare_tensors(*results, MATMUL_ATOL) if spec.name == MATMUL_KERNEL else compare_tensors(*results)


def _output_tensors(args: tuple[Any, ...]) -> list[Any]:
    """What a kernel may have written into: its tensors."""
    return [value for value in args if isinstance(value, torch.Tensor)]


def make_args(case: KernelCase, device: torch.device) -> tuple[Any, ...]:
    """A case's arguments, always the same."""
    torch.manual_seed(1)
    return case.make_args(device, torch.Generator().manual_seed(1))


@contextmanager
def poison_new_tensors() -> Iterator[None]:
    """New tensors are filled with NaN within."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)


def measure_kernels(report: CheckReport, clock: Clock, peaks: MachinePeaks, specs: list[KernelSpec]) -> None:
    """A row a case: microseconds of the device alone, and with launches, and shares of the roofs."""
    for spec in specs:
        for case in spec.cases:
            if report.should_skip("bench", f"{spec.name}, {case.name}"):
                continue
            with report.record("bench", f"{spec.name}, {case.name}") as row:
                args = make_args(case, clock.device)
                row["launched_us"] = TimeSpread.from_seconds(clock.seconds(lambda: spec.launch(*args))).p50  # noqa: B023
                replay = clock.capture(lambda: spec.launch(*args))  # noqa: B023
                spread = TimeSpread.from_seconds(clock.seconds(replay))
                row.update({"p20_us": spread.p20, "p50_us": spread.p50, "p80_us": spread.p80})
                row["gigabytes_per_second"] = case.bytes / spread.p50 / 1e3
                row["bandwidth_share"] = 1e6 * case.bytes / spread.p50 / peaks.bandwidth
                if flops := case.cost.flops:
                    row["teraflops"] = flops / spread.p50 / 1e6
                    row["products_share"] = 1e6 * flops / spread.p50 / peaks.flops
