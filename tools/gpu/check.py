"""`tools/gpu_check`: check correctness and speed on this machine's GPU; the last line of output is JSON.

    kernels      every kernel's cases against the torch references, new memory poisoned with NaN
    bench        times of every kernel and of decode steps of Llama 3.1 8B, as shipped and in other modes,
                 against their rooflines; the cost of batch_invariant
    invariance   small models with batch_invariant, alone, batched and with chunked prefill: bitwise equal
    decode       small models of each kind against the CPU engine in float32; whether an engine opened to
                 serve compiles anything after its start

A failure is reported and stops nothing else: each section runs in its own process, and if one loses its GPU
or dies, another continues with the next part. The exit status is 1 after a failure and 2 for invalid
arguments. No section takes more than twice its share of the remaining time.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

SECTIONS = {
    "kernels": {"kernels": 3},
    "bench": {"steps": 5, "bench": 2},
    "invariance": {"invariance": 2},
    "decode": {"decode": 3, "served": 2},
}
"""Command-line sections in order of execution: their processes, each with its share of the time."""
TIME_LIMIT, GRACE_PERIOD = 480, 60
"""Seconds for all sections, and for a section to end after its deadline."""
REPORT_LISTS = ("rows", "failures", "skipped")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the checks, print the results, and write gpu_check.json into the folder $OUT."""
    args = _parse_args(argv)
    from ...engine.execution.device import resolve_device  # noqa: PLC0415 - imports torch, which --help does not need
    from ...engine.utils.json import dumps  # noqa: PLC0415
    from ...kernels.common.errors import InputError  # noqa: PLC0415

    try:
        resolve_device(args.device)
    except InputError as error:
        print(f"gpu_check: {error}", file=sys.stderr)
        return 2
    start = time.monotonic()
    results: dict[str, Any] = {name: [] for name in REPORT_LISTS}
    section_shares = {
        name: share for group in args.sections or SECTIONS for name, share in SECTIONS[group].items()
    }
    while section_shares:
        now, end = time.monotonic(), start + args.seconds
        section, total_share = next(iter(section_shares)), sum(section_shares.values())
        limit = (end - now) * min(1, 2 * section_shares.pop(section) / total_share)
        _run_section(section, args.device, now + limit, results)
        results["seconds"] = round(time.monotonic() - start, 1)
        _write_report(dumps(results))
    print(dumps({key: value for key, value in results.items() if key != "rows"}), flush=True)
    return 1 if results["failures"] else 0


def _parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tools/gpu_check", description=__doc__.split("\n\n")[0])
    choices = ", ".join(SECTIONS)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"any of {choices}; default: all")
    parser.add_argument("--device", default="cuda", help="cuda or cuda:N; cpu runs tiny shapes, as a test")
    parser.add_argument("--seconds", type=float, default=TIME_LIMIT, help="start nothing after this time")
    args = parser.parse_args(argv)
    for section in args.sections:
        if section not in SECTIONS:
            parser.error(f"unknown section {section!r}; choose from {choices}")
    return args


def _run_section(section: str, device: str, deadline: float, results: dict[str, Any]) -> None:
    """Run a section, in a new process after each crash, and add the findings to `results`."""
    num_seen, status = 0, 1
    while status:
        if time.monotonic() >= deadline:
            results["skipped"].append(f"{section}: {'remaining parts' if num_seen else 'all parts'}")
            return
        with TemporaryDirectory() as scratch:
            result_path = Path(scratch) / "found.json"
            time_left = max(0.0, deadline - time.monotonic())
            status = _run_process(
                [section, device, str(time_left), str(num_seen), str(result_path)], time_left + GRACE_PERIOD
            )
            new_results = json.loads(result_path.read_text(encoding="utf-8")) if result_path.exists() else {}
        for name in REPORT_LISTS:
            results[name] += new_results.pop(name, [])
        num_reached = new_results.pop("seen", 0)
        if not new_results.pop("broken", False) and status:
            wrong = f"the process ended with status {status} in part {num_reached}"
            results["failures"].append({"section": section, "name": "all parts", "wrong": wrong})
        results.update(new_results)
        if num_reached <= num_seen:
            return  # a new process would fail in the same part
        num_seen = num_reached


def _run_process(args: list[str], seconds: float) -> int:
    """Run a section's process and return its exit status; 124 if it was killed after its time."""
    command = [sys.executable, "-m", "trimtab.tools.gpu.run_section", *args]
    try:
        return subprocess.run(command, timeout=seconds, check=False).returncode
    except subprocess.TimeoutExpired:
        return 124


def _write_report(text: str) -> None:
    folder = os.environ.get("OUT")
    if folder:
        tmp_path = Path(folder) / ".gpu_check.json.part"
        tmp_path.write_text(text + "\n", encoding="utf-8")
        tmp_path.replace(Path(folder) / "gpu_check.json")


if __name__ == "__main__":
    sys.exit(main())
