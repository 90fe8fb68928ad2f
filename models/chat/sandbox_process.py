"""A process with limits that renders a chat template: a stranger's code, which may loop, swell or crash."""

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
from .pipe import Pipe

PROGRAM = Path(__file__).with_name("sandbox_main.py")
START = 60.0
"""Seconds in which Python and jinja2 must be there: they are no strangers, but a machine may be busy."""
GONE = 5.0
"""Seconds after which a process that was killed is not waited for any longer."""
KEPT = ("TZ", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT")
"""All that the child has of the environment: the zone of the local time, and what Pythons need to start."""


@dataclass(frozen=True)
class Limits:
    """What a template may take for a conversation.

    cpu: seconds of a processor. wall: seconds by the clock. memory: bytes of address space, Python's own
    included. text: bytes of its answer, UTF-8. Where the system keeps no limits, as on Windows, there is
    only text.
    """

    cpu: float = 2.0
    wall: float = 10.0
    memory: int = 256 << 20
    text: int = 32 << 20


LIMITS = Limits()


class LimitError(InputError):
    """A template took more than it may, or its process ended: nothing is known of what it would say."""


class Child:
    """One child process, from its start to its end, with a template. owner: its parent process."""

    def __init__(self, source: str, limits: Limits) -> None:
        self._limits, self._process, self.owner = limits, _started(limits), os.getpid()
        self._pipe, self._spoiled = Pipe(self._process), False
        weakref.finalize(self, _end, self._process, self.owner)
        try:
            self.ask(b"", START)
        except LimitError as error:
            raise RunError(f"what renders chat templates does not start with {sys.executable}") from error
        (answer,) = self.ask(line_of({"source": source}), START)
        if "error" in answer:
            where = (
                f"line {answer['line']} of the chat template" if answer.get("line") else "the chat template"
            )
            raise InputError(f"{where} is no valid Jinja: {answer['error']}")

    @property
    def ended(self) -> bool:
        """Whether nobody is there to ask, or what would answer is of what was asked before."""
        return self._spoiled or self._pipe.ended

    def ask(self, line: bytes, seconds: float, answers: int = 1) -> list[dict[str, Any]]:
        """The program's answers to a line, up to the first that is an error.

        Without one in so many seconds the program is ended; raises LimitError.
        """
        found, self._spoiled = list[dict[str, Any]](), True  # until all is read, whatever comes between
        try:
            while True:
                reply, late = self._pipe.exchange(line, seconds, self._limits.text)
                if not isinstance(answer := _said(reply), dict):
                    break
                found.append(answer)
                if "error" in answer or len(found) == answers:
                    self._spoiled = False
                    return found
                line = b""
        finally:
            if self._spoiled:
                _end(self._process, self.owner)
        raise LimitError(
            f"the chat template {self._excess(seconds if late else None, len(reply))}; shorten the "
            "conversation, or give another chat_template"
        )

    def _excess(self, late: float | None, length: int) -> str:
        limits, status = self._limits, self._process.returncode
        if late is not None:
            return f"takes longer than {late:g} s"
        if length == limits.text:
            return f"writes more than {limits.text / 2**20:g} MiB"
        if status == errno.ENOMEM:
            return f"takes more than {limits.memory / 2**20:g} MiB of memory"
        if status == -getattr(signal, "SIGPROF", 0):
            return f"takes more than {limits.cpu:g} s of a processor"
        return f"ended the process that renders it, with status {status}"


def _started(limits: Limits) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-I", "-S", str(PROGRAM), str(limits.cpu), str(limits.memory)]
    found = [find_spec(name) for name in ("jinja2", "markupsafe")]
    paths = {str(Path(spec.origin).parents[1]): None for spec in found if spec and spec.origin}
    try:
        return subprocess.Popen(
            [*command, *paths],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={name: os.environ[name] for name in KEPT if name in os.environ},
            start_new_session=True,  # an interrupt at the terminal is its parent's to see
        )
    except OSError as error:
        raise RunError(f"no process can be started to render chat templates: {error}") from error


def _end(process: subprocess.Popen[bytes], owner: int) -> None:
    """Ends the process and waits for it; in a fork, of which it is no child, it only lets go of it.

    May be called again. An interrupt may leave a Popen's lock held, so that is not waited for in earnest.
    """
    if owner == os.getpid():
        process.kill()
        with suppress(subprocess.TimeoutExpired):
            process.wait(GONE)
    else:
        process.returncode = 0
    for pipe in filter(None, (process.stdin, process.stdout)):
        pipe.close()


def _said(reply: bytes) -> Any:
    """What a reply says; None when it is no whole line of JSON, as from a child that was taken over."""
    try:
        return json.loads(reply.decode("utf-8", "surrogatepass")) if reply.endswith(b"\n") else None
    except (ValueError, RecursionError):
        return None


def line_of(request: dict[str, Any]) -> bytes:
    """JSON on one line; lone surrogates stay what they are."""
    return json.dumps(request, ensure_ascii=False).encode("utf-8", "surrogatepass") + b"\n"
