"""The child process with limits that renders chat templates, which are foreign code."""

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
"""Seconds in which Python and jinja2 must be there: they are no strangers, but a machine may be busy."""
KILL_TIMEOUT = 5.0
"""Seconds after which a process that was killed is not waited for any longer."""
PASSED_ENV_VARS = ("TZ", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT")
"""All that the child has of the environment: the zone of the local time, and what Pythons need to start."""


@dataclass(frozen=True)
class SandboxLimits:
    """What a template may take for a conversation.

    cpu_seconds: seconds of a processor. wall_seconds: seconds by the clock. memory_bytes: bytes of address
    space, Python's own included. output_bytes: bytes of its answer, UTF-8. Where the system keeps no
    limits, as on Windows, there is only text.
    """

    cpu_seconds: float = 2.0
    wall_seconds: float = 10.0
    memory_bytes: int = 256 << 20
    output_bytes: int = 32 << 20


DEFAULT_LIMITS = SandboxLimits()


class LimitError(InputError):
    """A template took more than it may, or its process ended: nothing is known of what it would say."""


class SandboxProcess:
    """One child process, from its start to its end, with a template. owner_pid: its parent process."""

    def __init__(self, source: str, limits: SandboxLimits) -> None:
        self._limits, self._process, self.owner_pid = limits, _start_process(limits), os.getpid()
        self._pipe, self._broken = ProcessPipe(self._process), False
        weakref.finalize(self, _terminate, self._process, self.owner_pid)
        try:
            self.request(b"", START_TIMEOUT)
        except LimitError as error:
            raise RunError(f"what renders chat templates does not start with {sys.executable}") from error
        (answer,) = self.request(encode_line({"source": source}), START_TIMEOUT)
        if "error" in answer:
            location = (
                f"line {answer['line']} of the chat template" if answer.get("line") else "the chat template"
            )
            raise InputError(f"{location} is not valid Jinja: {answer['error']}")

    @property
    def has_ended(self) -> bool:
        """Whether nobody is there to ask, or what would answer is of what was asked before."""
        return self._broken or self._pipe.has_ended

    def request(self, line: bytes, timeout: float, num_answers: int = 1) -> list[dict[str, Any]]:
        """The program's answers to a line, up to the first that is an error.

        Without one in so many seconds the program is ended; raises LimitError.
        """
        answers, self._broken = list[dict[str, Any]](), True  # until all is read, whatever comes between
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
            f"shorten the "
            "conversation, or give another chat_template"
        )

    def _failure_message(self, timeout: float | None, num_bytes: int) -> str:
        limits, exit_code = self._limits, self._process.returncode
        if timeout is not None:
            return f"takes longer than {timeout:g} s"
        if num_bytes == limits.output_bytes:
            return f"writes more than {limits.output_bytes / 2**20:g} MiB"
        if exit_code == errno.ENOMEM:
            return f"takes more than {limits.memory_bytes / 2**20:g} MiB of memory"
        if exit_code == -getattr(signal, "SIGPROF", 0):
            return f"takes more than {limits.cpu_seconds:g} s of a processor"
        return f"ended the process that renders it, with status {exit_code}"


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
            start_new_session=True,  # an interrupt at the terminal is its parent's to see
        )
    except OSError as error:
        raise RunError(f"no process can be started to render chat templates: {error}") from error


def _terminate(process: subprocess.Popen[bytes], owner_pid: int) -> None:
    """Ends the process and waits for it; in a fork, of which it is no child, it only lets go of it.

    May be called again. An interrupt may leave a Popen's lock held, so that is not waited for in earnest.
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
    """What a reply says; None when it is no whole line of JSON, as from a child that was taken over."""
    try:
        return json.loads(reply.decode("utf-8", "surrogatepass")) if reply.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None


def encode_line(request: dict[str, Any]) -> bytes:
    """JSON on one line; lone surrogates stay what they are."""
    return json.dumps(request, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
