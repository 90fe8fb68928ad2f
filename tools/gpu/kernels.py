"""Check every kernel's cases against its torch reference on the same device, and time them."""

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

MAX_INTERPRETED_BYTES = 1 << 20
"""Maximum size of a case in Triton's interpreter, in bytes."""


def select_specs(device: torch.device) -> list[KernelSpec]:
    """All specs on a GPU; in the interpreter, the smallest case of each spec if it is small enough."""
    from ...kernels.specs.registry import SPECS  # noqa: PLC0415 - after TRITON_INTERPRET is set

    if device.type == "cuda":
        return list(SPECS)
    smallest = [(spec, min(spec.cases, key=lambda case: case.bytes)) for spec in SPECS]
    return [replace(spec, cases=(case,)) for spec, case in smallest if case.bytes <= MAX_INTERPRETED_BYTES]


def check_kernels(report: CheckReport, device: torch.device, specs: list[KernelSpec]) -> None:
    """Record a row per case: the largest error relative to the tolerance."""
    for spec in specs:
        for case in spec.cases:
            if report.should_skip("kernels", f"{spec.name}, {case.name}"):
                continue
            with report.record("kernels", f"{spec.name}, {case.name}") as row:
                row["error_share"], row["wrong"] = compare_kernel(spec, case, device)


def compare_kernel(spec: KernelSpec, case: KernelCase, device: torch.device) -> tuple[float, str]:
    """Compare the kernel's results and in-place outputs with the reference in its dtype and in float64."""
    kernel_args, reference_args = make_args(case, device), make_args(case, device)
    with poison_new_tensors():
        actual = spec.launch(*kernel_args)
    reference = spec.reference(*reference_args)
    if isinstance(actual, SamplerOutput):
        case_args = make_args(case, device)
        expected = spec.reference(*to_float64(case_args)) if spec.has_float64 else reference
        layout = next(value for value in kernel_args if isinstance(value, RequestLayout))
        return compare_sampler_outputs(actual, expected, layout)
    wide_args = to_float64(make_args(case, device))
    exact_result = spec.reference(*wide_args)
    if spec.normalize:
        actual, reference, exact_result = map(spec.normalize, (actual, reference, exact_result))
    return compare_tensors(
        (actual, *_output_tensors(kernel_args)),
        (reference, *_output_tensors(reference_args)),
        (exact_result, *_output_tensors(wide_args)),
        spec.atol,
    )


def _output_tensors(args: tuple[Any, ...]) -> list[Any]:
    """The tensor arguments, which a kernel may have written to."""
    return [value for value in args if isinstance(value, torch.Tensor)]


def make_args(case: KernelCase, device: torch.device) -> tuple[Any, ...]:
    """A case's arguments, deterministic."""
    torch.manual_seed(1)
    return case.make_args(device, torch.Generator().manual_seed(1))


@contextmanager
def poison_new_tensors() -> Iterator[None]:
    """Fill new tensors with NaN inside the context."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)


def measure_kernels(report: CheckReport, clock: Clock, peaks: MachinePeaks, specs: list[KernelSpec]) -> None:
    """Record a row per case: microseconds on the device and with launches, and fractions of the peaks."""
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
