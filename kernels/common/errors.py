"""Exceptions and warnings that are not bugs in trimtab, and helpers that format their messages."""

from __future__ import annotations

import re
from typing import Any

MAX_REPR, MAX_ERROR_TEXT = 100, 300
"""Maximum characters of a value, and of another library's error text, in a message."""


class InputError(ValueError):
    """The user's input is invalid. The message is one sentence: the value, and what would be right.

    The command line prints it and exits with status 2. `field` is the field of the request or config that is
    invalid, or "".
    """

    def __init__(self, message: str, field: str = "") -> None:
        super().__init__(message)
        self.field = field


class ContextError(InputError):
    """A prompt is longer than the context length."""


class RunError(RuntimeError):
    """The input is valid but the run failed: no network, out of memory, a full disk. Exit status 1."""


class BusyError(RunError):
    """The queue is full; the same request may be accepted a little later."""


class SteeringWarning(UserWarning):
    """Valid settings that may not do what the user meant. The command line prints it as a note."""


def short_repr(value: Any, max_len: int = MAX_REPR) -> str:
    """repr(value) on one line, truncated to `max_len` characters."""
    try:
        text = re.sub(r"\s*\n\s*", " ", repr(value))
    except Exception:  # a foreign __repr__ may raise, and repr of an integer of thousands of digits does
        text = f"a value of type {type(value).__name__}"
    return truncate(text, max_len)


def truncate(text: str, max_len: int = MAX_REPR) -> str:
    """Shorten `text` to `max_len` characters, with an ellipsis at the end if it was longer."""
    return text if len(text) <= max_len else f"{text[: max_len - 1]}…"


def error_text(error: BaseException) -> str:
    """The message of another library's exception, on one line and truncated."""
    return truncate(" ".join(str(error).split()) or type(error).__name__, MAX_ERROR_TEXT)


def format_error(error: BaseException) -> str:
    """An unexpected exception in one line: its type and message."""
    return ": ".join(filter(None, (type(error).__name__, " ".join(str(error).split()))))
