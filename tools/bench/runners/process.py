"""Handle of a runner process that runs only during its turn.

Between turns the process and its children are stopped with SIGSTOP, so that an engine that polls for work
takes no CPU time from the measured one.
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
"""Seconds to wait for a runner to exit by itself."""


class MissingPackageError(RunError):
    """The runner's Python lacks a package."""


class RunnerProcess:
    """A `python main_loop.py NAME` process. Raises InputError if `python` cannot be run."""

    def __init__(self, name: str, python: str = sys.executable, module_path: Path | None = None) -> None:
        """`module_path` comes first in PYTHONPATH."""
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
        self._send_signal(signal.SIGKILL)  # its children may outlive it
        self._process.kill()
        self._process.wait()
        self._stderr.close()

    def request(self, task: str, **kwargs: Any) -> dict[str, Any]:
        """Send a request and return the reply.

        Raises MissingPackageError if a package is missing, RunError if the task fails or the process exits.
        """
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
            raise MissingPackageError(f"its Python lacks the package {reply['missing']}")
        if "error" in reply:
            raise RunError(f"{self.name} failed: {' '.join(reply['error'].split())}")
        return reply

    def _send_signal(self, signum: int) -> None:
        """Signal the process group. The runner creates it before its first reply."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signum)

    def _last_stderr_line(self) -> str:
        self._stderr.seek(0)
        lines = [line.strip() for line in self._stderr if line.strip()]
        return lines[-1] if lines else "no output"
