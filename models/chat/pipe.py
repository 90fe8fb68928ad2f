"""Lines to a process and back, by the clock where the system can wait for a pipe, as Windows cannot."""

from __future__ import annotations

import os
import select
import subprocess
import time

CLOCK = hasattr(select, "poll")
"""Whether a pipe can be waited for until some time has come."""
PIECE = 1 << 16
"""Bytes that are read at once."""


class Pipe:
    """The standard input and output of a process, both piped."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._asks, self._hears = process.stdin.fileno(), process.stdout.fileno()
        self._heard = bytearray()
        if CLOCK:
            os.set_blocking(self._asks, False)

    @property
    def ended(self) -> bool:
        """Whether the process is known to have ended."""
        return CLOCK and _happens(self._hears, 0, 0.0)

    def exchange(self, line: bytes, seconds: float, most: int) -> tuple[bytes, bool]:
        """Says a line and hears one, and whether it took too long.

        It is less than a line when it did, when the process ends, or says more than `most` bytes.
        """
        until, rest = time.monotonic() + seconds, memoryview(line)
        try:
            while rest:
                if not _ready(self._asks, select.POLLOUT, until):
                    return b"", True
                rest = rest[os.write(self._asks, rest) :]  # no buffer, which a fork would write again
            end = self._heard.find(b"\n")
            while end < 0 and len(self._heard) < most:
                if not _ready(self._hears, select.POLLIN, until):
                    return b"", True
                if not (piece := os.read(self._hears, PIECE)):
                    break
                self._heard += piece
                end = self._heard.find(b"\n", len(self._heard) - len(piece))
        except OSError:
            return b"", False
        reply = bytes(self._heard[: most if end < 0 else min(end + 1, most)])
        del self._heard[: len(reply)]
        return reply, False


def _ready(pipe: int, event: int, until: float) -> bool:
    """Waits until the pipe can be read or written; False when that time has come first."""
    left = until - time.monotonic()
    return not CLOCK or (left > 0 and _happens(pipe, event, left))


def _happens(pipe: int, event: int, seconds: float) -> bool:
    """Whether it does within that time, or the pipe's other end is closed."""
    poll = select.poll()
    poll.register(pipe, event)
    return bool(poll.poll(seconds * 1000))
