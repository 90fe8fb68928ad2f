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

LOOP_SCRIPT = Path(__file__).with_name("main_loop.py")
EXIT_TIMEOUT = 10
"""Seconds that a worker has to end by itself."""


class MissingPackageError(RunError):
    """The worker's environment lacks a package."""


class RunnerProcess:
    """`python main_loop.py KIND`; `request` has it do one thing. Raises InputError for no such python."""

    def __init__(self, name: str, python: str = sys.executable, module_path: Path | None = None) -> None:
        """`module_path` is searched for modules before all others."""
        search_paths = [str(module_path)] * (module_path is not None) + [os.environ.get("PYTHONPATH", "")]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, search_paths))}
        self._stderr = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115
        self.name = name
        try:
            self._process = subprocess.Popen(
                [python, str(LOOP_SCRIPT), name],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._stderr,
                text=True,
                env=env,
            )
        except OSError as error:
            raise InputError(f"{python!r} cannot run {name}: {error.strerror}; name a Python") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._send_signal(signal.SIGCONT)
        assert self._process.stdin is not None
        with suppress(OSError):
            self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(0 if exc_type else EXIT_TIMEOUT)
        self._send_signal(signal.SIGKILL)  # what it has started may outlive it
        self._process.kill()
        self._process.wait()
        self._stderr.close()

    def request(self, task: str, **kwargs: Any) -> dict[str, Any]:
        """Its answer. Raises MissingError without its package, RunError when it fails or dies."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._send_signal(signal.SIGCONT)
        with suppress(BrokenPipeError):
            print(json.dumps({"do": task, **kwargs}), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise RunError(f"{self.name} ended: {self._last_stderr_line()}")
        self._send_signal(signal.SIGSTOP)
        reply: dict[str, Any] = json.loads(line)
        if "missing" in reply:
            raise MissingPackageError(f"its Python has no package {reply['missing']}")
        if "error" in reply:
            raise RunError(f"{self.name} failed: {' '.join(reply['error'].split())}")
        return reply

    def _send_signal(self, signum: int) -> None:
        """To all of its group, which is its own as soon as it has said anything."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signum)

    def _last_stderr_line(self) -> str:
        self._stderr.seek(0)
        lines = [line.strip() for line in self._stderr if line.strip()]
        return lines[-1] if lines else "it said nothing"
