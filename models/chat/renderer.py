"""A chat template, rendered in a child process that threads take turns with, and that may be replaced."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field
from typing import Any

from ...kernels.common.errors import InputError
from .sandbox_process import DEFAULT_LIMITS, SandboxLimits, SandboxProcess, encode_line


class SandboxRenderer:
    """Renders one template in a child process, which ends with this object. Any thread may ask.

    Raises InputError when the source is no valid template, LimitError when it takes too much to find out,
    and RunError when no process can be started.
    """

    def __init__(self, source: str, limits: SandboxLimits = DEFAULT_LIMITS) -> None:
        self._source, self._limits = source, limits
        self._locked = _LockedProcess(SandboxProcess(source, limits))

    def render(self, variables: dict[str, Any]) -> str:
        """The template's text for these variables, in which each text begins with "=" or "~".

        Raises InputError when the template fails, LimitError when it takes more than it may.
        """
        (answer,) = self._request(variables, [("", "")])
        return _answer_text(answer)

    def render_shadowed(
        self, variables: dict[str, Any], substitution: tuple[str, str]
    ) -> tuple[str, str | None]:
        """The same, and once more with each text after "~" disguised: to the template it is in other letters.

        `substitution` has the letters, and these others. None where the template fails on those. Raises as
        `render` does.
        """
        plain, *shadow = self._request(variables, [("", ""), substitution])
        return _answer_text(plain), _answer_text(shadow[0]) if "text" in shadow[0] else None

    def _request(
        self, variables: dict[str, Any], substitutions: list[tuple[str, str]]
    ) -> list[dict[str, Any]]:
        line = encode_line({"variables": variables, "disguises": substitutions})
        locked = self._locked
        # after a fork the child has another parent, and the lock may be held there
        if locked.process.owner_pid != os.getpid():
            locked = self._locked = _LockedProcess(SandboxProcess(self._source, self._limits))
        with locked.lock:
            if locked.process.has_ended:
                locked.process = SandboxProcess(self._source, self._limits)
            return locked.process.request(line, self._limits.wall_seconds, len(substitutions))


@dataclass
class _LockedProcess:
    """The child of a renderer, and whose turn it is to ask it."""

    process: SandboxProcess
    lock: threading.Lock = field(default_factory=threading.Lock)


def _answer_text(answer: dict[str, Any]) -> str:
    if "error" in answer:
        raise InputError(f"the chat template cannot render this conversation: {answer['error']}")
    return str(answer.get("text"))
