"""The ways a call can fail that are not a defect of trimtab, what it warns of, and how these tell a value."""

from __future__ import annotations

import re
from typing import Any

MAX_REPR, MAX_ERROR_TEXT = 100, 300
"""Characters that a sentence shows of a value, and of what another library says."""


class InputError(ValueError):
    """What the user gave is wrong. The message is one sentence: the value, and what would be right.

    The command line prints it and exits with status 2. `field` is the field of a request or a config that it
    is about, "" where it is not about one.
    """

    def __init__(self, message: str, field: str = "") -> None:
        super().__init__(message)
        self.field = field


class ContextError(InputError):
    """A prompt has more tokens than the context holds."""


class RunError(RuntimeError):
    """The input is fine but the run failed: no network, no memory, a full disk. Exit status 1."""


class BusyError(RunError):
    """Too much is waiting already; the same request may be taken a little later."""


class SteeringWarning(UserWarning):
    """A method does what it was told, and that may not be what was meant. A note on the command line."""


def short_repr(value: Any, max_len: int = MAX_REPR) -> str:
    """A value as Python writes it, on one line, and cut where it is long."""
    try:
        text = re.sub(r"\s*\n\s*", " ", repr(value))
    except Exception:  # someone else's code; and Python writes out no integer of thousands of digits
        text = f"a value of type {type(value).__name__}"
    return truncate(text, max_len)


def truncate(text: str, max_len: int = MAX_REPR) -> str:
    """A text that may be anybody's, as long as a sentence can hold it."""
    return text if len(text) <= max_len else f"{text[: max_len - 1]}…"


def error_text(error: BaseException) -> str:
    """What another library says of an error, on one line, and cut where it is long."""
    return truncate(" ".join(str(error).split()) or type(error).__name__, MAX_ERROR_TEXT)


def format_error(error: BaseException) -> str:
    """A defect, or a failure of somebody else's code, in one line."""
    return ": ".join(filter(None, (type(error).__name__, " ".join(str(error).split()))))
