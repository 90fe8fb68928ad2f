"""Incremental stop-string matching."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...kernels.common.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence


class StopStringMatcher:
    """Find the first stop string in a streamed text, independent of how the text is split.

    The text ends at the earliest match; of two that start at the same position, at the one completed first. A
    match waits while another that starts before it may still be completed. `include` keeps the stop string
    in the text. `matched` tells whether the text has ended, also after `flush`. Raises InputError for an
    empty stop string.
    """

    def __init__(self, stops: Sequence[str], include: bool = False) -> None:
        self._stop_strings = (stops,) if isinstance(stops, str) else tuple(stops)
        if "" in self._stop_strings:
            raise InputError("a stop string is ''; it must not be empty")
        self._include = include
        self._pending = ""
        self.matched = False

    def step(self, text: str) -> tuple[str, bool]:
        """Add text; return the text that is final, and whether it ends there."""
        if self.matched:
            return "", True
        text = self._pending + text
        partial_start, (start, end) = self._partial_start(text), self._find_match(text)
        if start <= partial_start and end:
            return self._truncate(text, start, end), True
        self._pending = text[partial_start:]
        return text[:partial_start], False

    def flush(self) -> str:
        """Return the pending text at the end of the stream."""
        start, end = self._find_match(self._pending)
        if end:
            return self._truncate(self._pending, start, end)
        pending, self._pending = self._pending, ""
        return pending

    def would_match(self, text: str) -> bool:
        """Whether `text` would complete a match; the state does not change."""
        text = self._pending + text
        start, end = self._find_match(text)
        return bool(end) and start <= self._partial_start(text)

    def _truncate(self, text: str, start: int, end: int) -> str:
        self.matched, self._pending = True, ""
        return text[: end if self._include else start]

    def _partial_start(self, text: str) -> int:
        """Start of the earliest partial match at the end of the text; len(text) without one."""
        return min((_partial_match_start(text, stop) for stop in self._stop_strings), default=len(text))

    def _find_match(self, text: str) -> tuple[int, int]:
        """Start and end of the earliest match, (0, 0) without one."""
        matches = ((text.find(stop), len(stop)) for stop in self._stop_strings)
        return min(((start, start + size) for start, size in matches if start >= 0), default=(0, 0))


def _partial_match_start(text: str, stop: str) -> int:
    """Start of the longest suffix of `text` that is a proper prefix of `stop`; len(text) without one."""
    start = text.find(stop[0], max(0, len(text) - len(stop) + 1))
    while start >= 0 and not stop.startswith(text[start:]):
        start = text.find(stop[0], start + 1)
    return start if start >= 0 else len(text)
