"""Searches in processes of their own, and what comes of them: a crash or a hang ends one process only."""

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
"""The most of a processor's time that an input may take."""
HANG_TIMEOUT = 90.0
"""Seconds without a word in which a process counts as hung; other programs may have slowed it."""
START_TIMEOUT = 300.0
"""The same while it loads what it needs."""
MEMORY_SLACK, MEMORY_PER_BYTE = 16 << 20, 40
"""Memory beyond twice the sound input's: what an allocator may round up to, and for each byte of an input."""


@dataclass
class FormatSearch:
    """What became of the inputs of one format, of which seeds from `next_seed` on are left."""

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
            f"(sound: {self.baseline_bytes / 2**20:.1f} MiB)"
        )

    def record(self, report: dict[str, Any], size: int) -> None:
        """What became of an input of so many bytes."""
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
        """The input of the seed `next_seed` is neither taken nor refused."""
        self.outcomes["fault"] += 1
        self.faults.append(f"{self.format} seed {self.next_seed}: {description}")
        self.next_seed += 1


def run_searches(formats: Iterable[str], first: int, count: int) -> list[FormatSearch]:
    """Tries `count` inputs of each format, from seed `first` on."""
    searches = [FormatSearch(name, first, first + count) for name in formats]
    while unfinished := [each for each in searches if each.next_seed < each.end_seed]:
        _run_worker(unfinished)
    return searches


def _run_worker(unfinished: list[FormatSearch]) -> None:
    """One process, to its end. Raises AssertionError when it ends before it has tried anything."""
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
    """A process, the lines that it writes, "" at their end, and its stderr."""
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
