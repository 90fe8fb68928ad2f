"""A chat template, rendered in a child process that threads take turns with, and that may be replaced."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field
from typing import Any

from ...kernels.common.errors import InputError
from .sandbox_process import LIMITS, Child, Limits, line_of


class Renderer:
    """Renders one template in a child process, which ends with this object. Any thread may ask.

    Raises InputError when the source is no valid template, LimitError when it takes too much to find out,
    and RunError when no process can be started.
    """

    def __init__(self, source: str, limits: Limits = LIMITS) -> None:
        self._source, self._limits = source, limits
        self._held = _Held(Child(source, limits))

    def render(self, variables: dict[str, Any]) -> str:
        """The template's text for these variables, in which each text begins with "=" or "~".

        Raises InputError when the template fails, LimitError when it takes more than it may.
        """
        (answer,) = self._answers(variables, [("", "")])
        return _text(answer)

    def render_both(self, variables: dict[str, Any], disguise: tuple[str, str]) -> tuple[str, str | None]:
        """The same, and once more with each text after "~" disguised: to the template it is in other letters.

        `disguise` has the letters, and these others. None where the template fails on those. Raises as
        `render` does.
        """
        plain, *more = self._answers(variables, [("", ""), disguise])
        return _text(plain), _text(more[0]) if "text" in more[0] else None

    def _answers(self, variables: dict[str, Any], disguises: list[tuple[str, str]]) -> list[dict[str, Any]]:
        line = line_of({"variables": variables, "disguises": disguises})
        held = self._held
        # after a fork the child has another parent, and the lock may be held there
        if held.child.owner != os.getpid():
            held = self._held = _Held(Child(self._source, self._limits))
        with held.lock:
            if held.child.ended:
                held.child = Child(self._source, self._limits)
            return held.child.ask(line, self._limits.wall, len(disguises))


@dataclass
class _Held:
    """The child of a renderer, and whose turn it is to ask it."""

    child: Child
    lock: threading.Lock = field(default_factory=threading.Lock)


def _text(answer: dict[str, Any]) -> str:
    if "error" in answer:
        raise InputError(f"the chat template cannot render this conversation: {answer['error']}")
    return str(answer.get("text"))
