"""A contestant's process as the bench holds it: one that computes only while it is asked.

Between its turns a worker is stopped (SIGSTOP, with all processes that it has started), so that no engine
that polls for work takes time from the one whose turn it is.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ....kernels.common.errors import InputError, RunError

if TYPE_CHECKING:
    from types import TracebackType

    from typing_extensions import Self

LOOP = Path(__file__).with_name("main_loop.py")
PATIENCE = 10
"""Seconds that a worker has to end by itself."""


class MissingError(RunError):
    """The worker's environment lacks a package."""


class Worker:
    """`python main_loop.py KIND`; `ask` has it do one thing. Raises InputError for no such python."""

    def __init__(self, kind: str, python: str = sys.executable, path: Path | None = None) -> None:
        """`path` is searched for modules before all others."""
        places = [str(path)] * (path is not None) + [os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, places))}
        self._said = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self.kind = kind
        try:
            self._process = subprocess.Popen(
                [python, str(LOOP), kind],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._said,
                text=True,
                env=environment,
            )
        except OSError as error:
            raise InputError(f"{python!r} cannot run {kind}: {error.strerror}; name a Python") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._signal(signal.SIGCONT)
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(0 if kind else PATIENCE)
        self._signal(signal.SIGKILL)  # what it has started may outlive it
        self._process.kill()
        self._process.wait()
        self._said.close()

    def ask(self, do: str, **what: Any) -> dict[str, Any]:
        """Its answer. Raises MissingError without its package, RunError when it fails or dies."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._signal(signal.SIGCONT)
        with suppress(BrokenPipeError):
            print(json.dumps({"do": do, **what}), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise RunError(f"{self.kind} ended: {self._last_words()}")
        self._signal(signal.SIGSTOP)
        answer: dict[str, Any] = json.loads(line)
        if "missing" in answer:
            raise MissingError(f"its Python has no package {answer['missing']}")
        if "error" in answer:
            raise RunError(f"{self.kind} failed: {' '.join(answer['error'].split())}")
        return answer

    def _signal(self, number: int) -> None:
        """To all of its group, which is its own as soon as it has said anything."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _last_words(self) -> str:
        self._said.seek(0)
        lines = [line.strip() for line in self._said if line.strip()]
        return lines[-1] if lines else "it said nothing"
