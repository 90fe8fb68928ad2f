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

TRIAL = "trimtab.tests.fuzz.search_worker"
SECONDS = 10.0
"""The most of a processor's time that an input may take."""
PATIENCE = 90.0
"""Seconds without a word in which a process counts as hung; other programs may have slowed it."""
START = 300.0
"""The same while it loads what it needs."""
SLACK, FOLD = 16 << 20, 40
"""Memory beyond twice the sound input's: what an allocator may round up to, and for each byte of an input."""


@dataclass
class Search:
    """What became of the inputs of one format, of which seeds from `next` on are left."""

    format: str
    next: int
    end: int
    outcomes: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    seconds: float = 0.0
    bytes: int = 0
    honest: int = 0

    def __str__(self) -> str:
        counts = ", ".join(f"{number} {name}" for name, number in sorted(self.outcomes.items()))
        return (
            f"{self.format}: {counts}; worst {self.seconds:.2f} s, {self.bytes / 2**20:.1f} MiB "
            f"(sound: {self.honest / 2**20:.1f} MiB)"
        )

    def told(self, said: dict[str, Any], size: int) -> None:
        """What became of an input of so many bytes."""
        self.seconds, self.bytes = max(self.seconds, said["seconds"]), max(self.bytes, said["bytes"])
        problem = said["said"] if said["outcome"] == "fault" else ""
        if said["seconds"] > SECONDS:
            problem = f"took {said['seconds']:.1f} s"
        if said["bytes"] > 2 * self.honest + SLACK + FOLD * size:
            problem = f"took {said['bytes'] >> 20} MiB for {size} bytes: {said['said'] or said['outcome']}"
        if problem:
            self.fault(problem)
        else:
            self.outcomes[said["outcome"]] += 1
            self.next += 1

    def fault(self, what: str) -> None:
        """The input of the seed `next` is neither taken nor refused."""
        self.outcomes["fault"] += 1
        self.faults.append(f"{self.format} seed {self.next}: {what}")
        self.next += 1


def search(formats: Iterable[str], first: int, count: int) -> list[Search]:
    """Tries `count` inputs of each format, from seed `first` on."""
    found = [Search(name, first, first + count) for name in formats]
    while left := [each for each in found if each.next < each.end]:
        _run(left)
    return found


def _run(left: list[Search]) -> None:
    """One process, to its end. Raises AssertionError when it ends before it has tried anything."""
    by_name, at, size, ready = {each.format: each for each in left}, left[0], 0, False
    with _trial(left) as (process, lines, errors):
        while True:
            try:
                line = lines.get(timeout=PATIENCE if ready else START)
            except Empty:
                line, why = "", "hangs"
            else:
                why = "" if line else f"ended the process with {process.wait()}"
            if not line:
                if why.endswith(" 0"):
                    return
                errors.seek(0)
                at.fault(f"{why}\n{errors.read().decode(errors='replace')[-1500:]}")
                assert ready, at.faults[-1]
                return
            said = json.loads(line)
            at, ready = by_name[said["format"]], True
            if "honest" in said:
                at.honest = max(at.honest, said["honest"])
            elif "size" in said:
                size = said["size"]
            else:
                at.told(said, size)


@contextmanager
def _trial(left: list[Search]) -> Iterator[tuple[subprocess.Popen[str], Queue[str], IO[bytes]]]:
    """A process, the lines that it writes, "" at their end, and its stderr."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as errors:
        tasks = [f"{each.format}:{each.next}:{each.end}" for each in left]
        command = [sys.executable, "-m", TRIAL, str(Path(folder)), *tasks]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as process:
            lines: Queue[str] = Queue()

            def read() -> None:
                assert process.stdout is not None
                for line in process.stdout:
                    lines.put(line)
                lines.put("")

            threading.Thread(target=read, daemon=True).start()
            try:
                yield process, lines, errors
            finally:
                process.kill()
