"""Stop strings: where a growing text ends."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...kernels.common.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence


class StopStrings:
    """Finds the first stop text in a growing text, wherever the pieces it comes in are cut.

    The text ends at the earliest match; of two that start at the same place, at the one completed first. A
    match waits while another that starts before it may still be completed. `include` keeps the stop text
    itself. `hit` tells whether the text has ended, also after `finish`. Raises InputError when a stop text
    is empty.
    """

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        self._stops = (stops,) if isinstance(stops, str) else tuple(stops)
        if "" in self._stops:
            raise InputError("a stop text is ''; it must not be empty")
        self._include = include
        self._held = ""
        self.hit = False

    def push(self, text: str) -> tuple[str, bool]:
        """Takes more text; returns the text that may be shown now, and whether it ends there."""
        if self.hit:
            return "", True
        text = self._held + text
        unfinished, (start, end) = self._unfinished(text), self._earliest(text)
        if start <= unfinished and end:
            return self._cut(text, start, end), True
        self._held = text[unfinished:]
        return text[:unfinished], False

    def finish(self) -> str:
        """The text still held back, when no more will come."""
        start, end = self._earliest(self._held)
        if end:
            return self._cut(self._held, start, end)
        held, self._held = self._held, ""
        return held

    def ended_by(self, text: str) -> bool:
        """Whether the text would end if this came next; nothing is taken."""
        text = self._held + text
        start, end = self._earliest(text)
        return bool(end) and start <= self._unfinished(text)

    def _cut(self, text: str, start: int, end: int) -> str:
        self.hit, self._held = True, ""
        return text[: end if self._include else start]

    def _unfinished(self, text: str) -> int:
        """Where a stop text may have begun that is not complete, the end of the text where none may."""
        return min((_unfinished(text, stop) for stop in self._stops), default=len(text))

    def _earliest(self, text: str) -> tuple[int, int]:
        """Start and end of the earliest match, (0, 0) where there is none."""
        places = ((text.find(stop), len(stop)) for stop in self._stops)
        return min(((at, at + size) for at, size in places if at >= 0), default=(0, 0))


def _unfinished(text: str, stop: str) -> int:
    """Where the longest tail of `text` begins that is a beginning of `stop`, but not all of it."""
    at = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while at >= 0 and not stop.startswith(text[at:]):
        at = text.find(stop[0], at + 1)
    return at if at >= 0 else len(text)
