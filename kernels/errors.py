"""The two ways a call can fail that are not a defect of trimtab, and what it warns of."""

from __future__ import annotations


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


def defect(error: BaseException) -> str:
    """A defect, or a failure of somebody else's code, in one line."""
    return ": ".join(filter(None, (type(error).__name__, " ".join(str(error).split()))))


class SteeringWarning(UserWarning):
    """A method does what it was told, and that may not be what was meant. A note on the command line."""
