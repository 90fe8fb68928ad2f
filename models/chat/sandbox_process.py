"""Child process with resource limits that renders chat templates, which are untrusted code."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import weakref
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ...kernels.common.errors import InputError, RunError
from .pipe import ProcessPipe

SANDBOX_SCRIPT = Path(__file__).with_name("sandbox_main.py")
START_TIMEOUT = 60.0
"""Seconds to start Python and import jinja2. These are trusted code, but the machine may be busy."""
KILL_TIMEOUT = 5.0
"""Maximum seconds to wait for a killed process."""
PASSED_ENV_VARS = ("TZ", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT")
"""Environment variables passed to the child: the time zone, and those that Python needs to start."""


@dataclass(frozen=True)
class SandboxLimits:
    """Limits of a template for one conversation.

    cpu_seconds: CPU time. wall_seconds: wall-clock time. memory_bytes: address space, including that of
    Python. output_bytes: size of the answer in UTF-8. On systems without resource limits, such as Windows,
    only output_bytes applies.
    """

    cpu_seconds: float = 2.0
    wall_seconds: float = 10.0
    memory_bytes: int = 256 << 20
    output_bytes: int = 32 << 20


DEFAULT_LIMITS = SandboxLimits()


class LimitError(InputError):
    """A template exceeded a limit, or its process ended, so its result is unknown."""


class SandboxProcess:
    """A child process that renders one template. owner_pid: the parent's process id."""

    def __init__(self, source: str, limits: SandboxLimits) -> None:
        self._limits, self._process, self.owner_pid = limits, _start_process(limits), os.getpid()
        self._pipe, self._broken = ProcessPipe(self._process), False
        weakref.finalize(self, _terminate, self._process, self.owner_pid)
        try:
            self.request(b"", START_TIMEOUT)
        except LimitError as error:
            raise RunError(f"cannot start {sys.executable} to render chat templates") from error
        (answer,) = self.request(encode_line({"source": source}), START_TIMEOUT)
        if "error" in answer:
            location = (
                f"line {answer['line']} of the chat template" if answer.get("line") else "the chat template"
            )
            raise InputError(f"{location} is not valid Jinja: {answer['error']}")

    @property
    def has_ended(self) -> bool:
        """Whether the process has ended, or its next line may answer an earlier request."""
        return self._broken or self._pipe.has_ended

    def request(self, line: bytes, timeout: float, num_answers: int = 1) -> list[dict[str, Any]]:
        """Send a line and return the child's answers, up to the first error or `num_answers`.

        If an answer takes longer than `timeout` seconds, kills the child and raises LimitError.
        """
        answers, self._broken = (
            list[dict[str, Any]](),
            True,
        )  # until all answers are read, even if interrupted
        try:
            while True:
                reply, timed_out = self._pipe.exchange(line, timeout, self._limits.output_bytes)
                if not isinstance(answer := _parse_reply(reply), dict):
                    break
                answers.append(answer)
                if "error" in answer or len(answers) == num_answers:
                    self._broken = False
                    return answers
                line = b""
        finally:
            if self._broken:
                _terminate(self._process, self.owner_pid)
        raise LimitError(
            f"the chat template {self._failure_message(timeout if timed_out else None, len(reply))}; "
            "shorten the conversation, or use another chat_template"
        )

    def _failure_message(self, timeout: float | None, num_bytes: int) -> str:
        limits, exit_code = self._limits, self._process.returncode
        if timeout is not None:
            return f"took longer than {timeout:g} s"
        if num_bytes == limits.output_bytes:
            return f"wrote more than {limits.output_bytes / 2**20:g} MiB"
        if exit_code == errno.ENOMEM:
            return f"used more than {limits.memory_bytes / 2**20:g} MiB of memory"
        if exit_code == -getattr(signal, "SIGPROF", 0):
            return f"used more than {limits.cpu_seconds:g} s of CPU time"
        return f"ended its process with status {exit_code}"


def _start_process(limits: SandboxLimits) -> subprocess.Popen[bytes]:
    command = [
        sys.executable,
        "-I",
        "-S",
        str(SANDBOX_SCRIPT),
        str(limits.cpu_seconds),
        str(limits.memory_bytes),
    ]
    specs = [find_spec(name) for name in ("jinja2", "markupsafe")]
    paths = {str(Path(spec.origin).parents[1]): None for spec in specs if spec and spec.origin}
    try:
        return subprocess.Popen(
            [*command, *paths],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={name: os.environ[name] for name in PASSED_ENV_VARS if name in os.environ},
            start_new_session=True,  # Ctrl-C in the terminal is for the parent only
        )
    except OSError as error:
        raise RunError(f"cannot start a process to render chat templates: {error}") from error


def _terminate(process: subprocess.Popen[bytes], owner_pid: int) -> None:
    """Kill the process and wait for it; in a fork, which is not its parent, only close the pipes.

    May be called again. The wait has a timeout because an interrupt may leave the lock of a Popen locked.
    """
    if owner_pid == os.getpid():
        process.kill()
        with suppress(subprocess.TimeoutExpired):
            process.wait(KILL_TIMEOUT)
    else:
        process.returncode = 0
    for pipe in filter(None, (process.stdin, process.stdout)):
        pipe.close()


def _parse_reply(reply: bytes) -> Any:
    """Parse a reply; None if it is not a complete line of JSON, as from a compromised child."""
    try:
        return json.loads(reply.decode("utf-8", "surrogatepass")) if reply.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None


def encode_line(request: dict[str, Any]) -> bytes:
    """Encode as one line of JSON; lone surrogates are kept."""
    return json.dumps(request, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
