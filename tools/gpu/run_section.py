"""Run one section of the GPU check in its own process, and save the results to a file after each row."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from .report import CheckReport

EXIT_GPU_LOST = 3
"""Exit status if the GPU became unusable for this process."""


def main(argv: list[str]) -> int:
    """argv: section, device, seconds, number of parts to skip, result file."""
    section, device_name, seconds, num_done, path = argv
    if device_name == "cpu":  # before triton is imported
        os.environ["TRITON_INTERPRET"] = "1"
    from ...engine.execution.device import resolve_device  # noqa: PLC0415
    from .report import CheckReport  # noqa: PLC0415

    device = resolve_device(device_name)
    if device.type == "cuda":
        _setup_device(device)
    report = CheckReport(time.monotonic() + float(seconds), device, int(num_done), Path(path))
    with report.record(section, "all parts"):  # catches errors outside the parts
        report.metadata["machine"] = _machine_info(device)
        _run_section(section, report, device)
    return EXIT_GPU_LOST if report.gpu_lost else 0


def _setup_device(device: torch.device) -> None:
    """Make the device current, for Triton's launches, and disable TF32 whatever the environment says."""
    import torch  # noqa: PLC0415

    torch.cuda.set_device(device)
    torch.backends.cuda.matmul.allow_tf32 = False


def _run_section(section: str, report: CheckReport, device: torch.device) -> None:
    import torch  # noqa: PLC0415 - after TRITON_INTERPRET is set

    from ..common import machine_peaks  # noqa: PLC0415
    from ..common.timing import Clock  # noqa: PLC0415
    from . import decode, invariance, kernels, step_benchmark, tiny_models  # noqa: PLC0415

    on_cpu, device_name = device.type == "cpu", str(device)
    with TemporaryDirectory() as scratch:
        if section == "kernels":
            kernels.check_kernels(report, device, kernels.select_specs(device))
        elif section == "decode":
            decode.check_decode(
                report, device_name, decode.TINY_PLAN if on_cpu else decode.FULL_PLAN, Path(scratch)
            )
        elif section == "served":
            decode.check_served(
                report, device_name, decode.TINY_PLAN if on_cpu else decode.FULL_PLAN, Path(scratch)
            )
        elif section == "invariance":
            invariance.check_invariance(
                report, device_name, decode.TINY_PLAN if on_cpu else decode.FULL_PLAN, Path(scratch)
            )
        else:
            peaks = machine_peaks.measure_peaks(torch.bfloat16, device)
            report.metadata |= {"bandwidth": peaks.bandwidth, "products": peaks.flops}
            if section == "bench":
                clock = Clock(device, tries=1) if on_cpu else Clock(device)
                kernels.measure_kernels(report, clock, peaks, kernels.select_specs(device))
                return
            plan = step_benchmark.FULL_PLAN
            if on_cpu:
                folder = tiny_models.write_model(
                    Path(scratch) / "model", "llama", tiny_models.TINY_MODEL, decode.TINY_PLAN.dtypes[0]
                )
                plan = step_benchmark.with_model(step_benchmark.TINY_PLAN, str(folder))
            step_benchmark.measure_steps(report, device_name, plan, peaks)


def _machine_info(device: torch.device) -> dict[str, Any]:
    """Metadata of the machine and software that the measurements ran on."""
    import torch  # noqa: PLC0415
    import triton  # noqa: PLC0415

    from ..common.environment import run_metadata  # noqa: PLC0415

    info = {**run_metadata(), "triton": triton.__version__, "cuda": torch.version.cuda, "device": str(device)}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        info |= {"gpu": properties.name, "memory": properties.total_memory}
        info["multiprocessors"] = properties.multi_processor_count
    return info


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
