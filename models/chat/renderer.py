"""Render a chat template in a child process that threads share and that is restarted after a failure."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field
from typing import Any

from ...kernels.common.errors import InputError
from .sandbox_process import DEFAULT_LIMITS, SandboxLimits, SandboxProcess, encode_line


class SandboxRenderer:
    """Render one template in a child process, which ends with this object. Thread-safe.

    Raises InputError when the source is not a valid template, LimitError when compiling it exceeds the
    limits, and RunError when the process cannot be started.
    """

    def __init__(self, source: str, limits: SandboxLimits = DEFAULT_LIMITS) -> None:
        self._source, self._limits = source, limits
        self._locked = _LockedProcess(SandboxProcess(source, limits))

    def render(self, variables: dict[str, Any]) -> str:
        """Render the template with these variables, in which each string begins with "=" or "~".

        Raises InputError when the template fails, LimitError when it exceeds the limits.
        """
        (answer,) = self._request(variables, [("", "")])
        return _answer_text(answer)

    def render_shadowed(
        self, variables: dict[str, Any], substitution: tuple[str, str]
    ) -> tuple[str, str | None]:
        """Render twice: as `render`, and with the characters of each string marked "~" substituted.

        `substitution` is the characters, and their substitutes. The second text is None if the template fails
        on it. Raises as `render` does.
        """
        plain, *shadow = self._request(variables, [("", ""), substitution])
        return _answer_text(plain), _answer_text(shadow[0]) if "text" in shadow[0] else None

    def _request(
        self, variables: dict[str, Any], substitutions: list[tuple[str, str]]
    ) -> list[dict[str, Any]]:
        line = encode_line({"variables": variables, "disguises": substitutions})
        locked = self._locked
        # in a fork, the child belongs to the parent process, and the lock may be locked
        if locked.process.owner_pid != os.getpid():
            locked = self._locked = _LockedProcess(SandboxProcess(self._source, self._limits))
        with locked.lock:
            if locked.process.has_ended:
                locked.process = SandboxProcess(self._source, self._limits)
            return locked.process.request(line, self._limits.wall_seconds, len(substitutions))


@dataclass
class _LockedProcess:
    """The child process of a renderer, and the lock that serializes its requests."""

    process: SandboxProcess
    lock: threading.Lock = field(default_factory=threading.Lock)


def _answer_text(answer: dict[str, Any]) -> str:
    if "error" in answer:
        raise InputError(f"the chat template cannot render this conversation: {answer['error']}")
    return str(answer.get("text"))
