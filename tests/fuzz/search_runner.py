"""Run fuzz searches in worker processes and collect their results; a crash or hang ends one worker."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, Queue
from typing import IO, Any

WORKER_MODULE = "trimtab.tests.fuzz.search_worker"
MAX_CPU_SECONDS = 10.0
"""Maximum CPU time for an input."""
HANG_TIMEOUT = 90.0
"""Seconds without output after which a worker counts as hung; allows for a busy machine."""
START_TIMEOUT = 300.0
"""The same for a worker that is starting."""
MEMORY_SLACK, MEMORY_PER_BYTE = 16 << 20, 40
"""Bytes allowed beyond twice a valid input's peak: allocator rounding, and for each input byte."""


@dataclass
class FormatSearch:
    """Results of one format; the seeds from `next_seed` to `end_seed` remain."""

    format: str
    next_seed: int
    end_seed: int
    outcomes: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    max_seconds: float = 0.0
    max_bytes: int = 0
    baseline_bytes: int = 0

    def __str__(self) -> str:
        counts = ", ".join(f"{number} {name}" for name, number in sorted(self.outcomes.items()))
        return (
            f"{self.format}: {counts}; worst {self.max_seconds:.2f} s, {self.max_bytes / 2**20:.1f} MiB "
            f"(valid: {self.baseline_bytes / 2**20:.1f} MiB)"
        )

    def record(self, report: dict[str, Any], size: int) -> None:
        """Record the worker's report on an input of `size` bytes."""
        self.max_seconds, self.max_bytes = (
            max(self.max_seconds, report["seconds"]),
            max(self.max_bytes, report["bytes"]),
        )
        problem = report["message"] if report["outcome"] == "fault" else ""
        if report["seconds"] > MAX_CPU_SECONDS:
            problem = f"took {report['seconds']:.1f} s"
        if report["bytes"] > 2 * self.baseline_bytes + MEMORY_SLACK + MEMORY_PER_BYTE * size:
            problem = (
                f"took {report['bytes'] >> 20} MiB for {size} bytes: {report['message'] or report['outcome']}"
            )
        if problem:
            self.add_fault(problem)
        else:
            self.outcomes[report["outcome"]] += 1
            self.next_seed += 1

    def add_fault(self, description: str) -> None:
        """Record that the input of `next_seed` was neither accepted nor refused."""
        self.outcomes["fault"] += 1
        self.faults.append(f"{self.format} seed {self.next_seed}: {description}")
        self.next_seed += 1


def run_searches(formats: Iterable[str], first: int, count: int) -> list[FormatSearch]:
    """Try `count` inputs of each format, starting at seed `first`."""
    searches = [FormatSearch(name, first, first + count) for name in formats]
    while unfinished := [each for each in searches if each.next_seed < each.end_seed]:
        _run_worker(unfinished)
    return searches


def _run_worker(unfinished: list[FormatSearch]) -> None:
    """Run one worker to its end. Raises AssertionError if it ends before its first input."""
    by_format, current, size, is_ready = {each.format: each for each in unfinished}, unfinished[0], 0, False
    with _worker(unfinished) as (process, lines, errors):
        while True:
            try:
                line = lines.get(timeout=HANG_TIMEOUT if is_ready else START_TIMEOUT)
            except Empty:
                line, reason = "", "hangs"
            else:
                reason = "" if line else f"ended the process with {process.wait()}"
            if not line:
                if reason.endswith(" 0"):
                    return
                errors.seek(0)
                current.add_fault(f"{reason}\n{errors.read().decode(errors='replace')[-1500:]}")
                assert is_ready, current.faults[-1]
                return
            report = json.loads(line)
            current, is_ready = by_format[report["format"]], True
            if "baseline" in report:
                current.baseline_bytes = max(current.baseline_bytes, report["baseline"])
            elif "size" in report:
                size = report["size"]
            else:
                current.record(report, size)


@contextmanager
def _worker(unfinished: list[FormatSearch]) -> Iterator[tuple[subprocess.Popen[str], Queue[str], IO[bytes]]]:
    """Start a worker. Yields the process, its stdout lines followed by "", and its stderr."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as errors:
        tasks = [f"{each.format}:{each.next_seed}:{each.end_seed}" for each in unfinished]
        command = [sys.executable, "-m", WORKER_MODULE, str(Path(folder)), *tasks]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
            lines: Queue[str] = Queue()

            def read_lines() -> None:
                assert process.stdout is not None
                for line in process.stdout:
                    lines.put(line)
                lines.put("")

            threading.Thread(target=read_lines, daemon=True).start()
            try:
                yield process, lines, errors
            finally:
                process.kill()
