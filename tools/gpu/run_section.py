"""One section of the check of a GPU, in a process of its own: what it finds goes to a file as it is found."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from .report import Report

BROKEN = 3
"""The exit status where the GPU does nothing more for this process."""


def main(words: list[str]) -> int:
    """Section, device, seconds, how many parts to pass over, and the file."""
    section, name, seconds, passed, into = words
    if name == "cpu":  # before triton is imported
        os.environ["TRITON_INTERPRET"] = "1"
    from ...engine.execution.device import device_of  # noqa: PLC0415
    from .report import Report  # noqa: PLC0415

    device = device_of(name)
    if device.type == "cuda":
        _set_up(device)
    report = Report(time.monotonic() + float(seconds), device, int(passed), Path(into))
    with report.part(section, "all of it"):  # what its own parts do not catch
        report.more["machine"] = _machine(device)
        _run(section, report, device)
    return BROKEN if report.broken else 0


def _set_up(device: torch.device) -> None:
    """Triton launches on the device that is the current one; float32 products are float32's, whatever the
    environment says."""
    import torch  # noqa: PLC0415

    torch.cuda.set_device(device)
    torch.backends.cuda.matmul.allow_tf32 = False


def _run(section: str, report: Report, device: torch.device) -> None:
    import torch  # noqa: PLC0415 - triton has been told what it is to do

    from ..common import machine_peaks  # noqa: PLC0415
    from ..common.timing import Clock  # noqa: PLC0415
    from . import decode, invariance, kernels, step_benchmark, tiny_models  # noqa: PLC0415

    small, place = device.type == "cpu", str(device)
    with TemporaryDirectory() as scratch:
        if section == "kernels":
            kernels.check(report, device, kernels.specs_of(device))
        elif section == "decode":
            decode.check(report, place, decode.LITTLE if small else decode.FULL, Path(scratch))
        elif section == "served":
            decode.check_served(report, place, decode.LITTLE if small else decode.FULL, Path(scratch))
        elif section == "invariance":
            invariance.check(report, place, decode.LITTLE if small else decode.FULL, Path(scratch))
        else:
            found = machine_peaks.measured(torch.bfloat16, device)
            report.more |= {"bandwidth": found.bandwidth, "products": found.products}
            if section == "bench":
                clock = Clock(device, tries=1) if small else Clock(device)
                kernels.measure(report, clock, found, kernels.specs_of(device))
                return
            plan = step_benchmark.FULL
            if small:
                folder = tiny_models.write(
                    Path(scratch) / "model", "llama", tiny_models.TINY, decode.LITTLE.dtypes[0]
                )
                plan = step_benchmark.with_model(step_benchmark.LITTLE, str(folder))
            step_benchmark.measure(report, place, plan, found)


def _machine(device: torch.device) -> dict[str, Any]:
    """What the numbers were measured on."""
    import torch  # noqa: PLC0415
    import triton  # noqa: PLC0415

    from ..common.environment import where  # noqa: PLC0415

    found = {**where(), "triton": triton.__version__, "cuda": torch.version.cuda, "device": str(device)}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {"gpu": properties.name, "memory": properties.total_memory}
        found["multiprocessors"] = properties.multi_processor_count
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
