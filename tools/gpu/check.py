"""`tools/gpu_check`: is all right on this machine's GPU, and how fast is it? One line of JSON at the end.

    kernels      every kernel's cases beside the torch references, new memory poisoned
    bench        every kernel's time, and a decoding step's of Llama 3.1 8B, as shipped and in other ways,
                 beside their floors; what batch_invariant costs
    invariance   with batch_invariant, small models alone, together and in pieces: equal to the last bit
    decode       small models of each kind beside the CPU's engine in float32; whether one that is opened to
                 serve compiles anything after its start

What fails is told of and stops nothing else: each section is a process of its own, and where one has lost its
GPU, or died, another goes on behind that place. The exit status is 1 then, and 2 for a wrong question. No
section takes more than twice its share of the time that is left.
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
"""What may be asked for, in the order in which it is done: the processes' names of it and their shares of the
time."""
TIME_LIMIT, GRACE_PERIOD = 480, 60
"""What all may take, and how long a section that has no more time may need to end."""
REPORT_LISTS = ("rows", "failures", "skipped")


def main(argv: Sequence[str] | None = None) -> int:
    """Checks, prints, and writes gpu_check.json into the folder that the environment names as OUT."""
    args = _parse_args(argv)
    from ...engine.execution.device import resolve_device  # noqa: PLC0415 - it brings torch, which --help does not need
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
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {choices}; all without")
    parser.add_argument("--device", default="cuda", help="cuda or cuda:N; cpu tries this program out, small")
    parser.add_argument("--seconds", type=float, default=TIME_LIMIT, help="after these nothing more begins")
    args = parser.parse_args(argv)
    for section in args.sections:
        if section not in SECTIONS:
            parser.error(f"unknown section {section!r}; known are {choices}")
    return args


def _run_section(section: str, device: str, deadline: float, results: dict[str, Any]) -> None:
    """Runs a section to its end, in as many processes as that takes; adds to `results` what they found."""
    num_seen, status = 0, 1
    while status:
        if time.monotonic() >= deadline:
            results["skipped"].append(f"{section}: {'what is left of it' if num_seen else 'all of it'}")
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
            wrong = f"its process ended with status {status} in its part {num_reached}"
            results["failures"].append({"section": section, "name": "all of it", "wrong": wrong})
        results.update(new_results)
        if num_reached <= num_seen:
            return  # it would end there again
        num_seen = num_reached


def _run_process(args: list[str], seconds: float) -> int:
    """The exit status of a process for a section; 124 when it was ended after its time."""
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
