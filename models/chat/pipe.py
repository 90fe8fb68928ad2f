"""Exchange lines with a child process, with timeouts."""

from __future__ import annotations

import os
import select
import subprocess
import time

HAS_POLL = hasattr(select, "poll")
"""Whether waiting for a pipe can time out; false on Windows."""
READ_SIZE = 1 << 16
"""Bytes per read."""


class ProcessPipe:
    """The standard input and output of a process, both piped."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._stdin, self._stdout = process.stdin.fileno(), process.stdout.fileno()
        self._buffer = bytearray()
        if HAS_POLL:
            os.set_blocking(self._stdin, False)

    @property
    def has_ended(self) -> bool:
        """Whether the process is known to have ended."""
        return HAS_POLL and _poll_event(self._stdout, 0, 0.0)

    def exchange(self, line: bytes, timeout: float, max_bytes: int) -> tuple[bytes, bool]:
        """Write a line and read one. Return the reply, and whether `timeout` seconds passed first.

        The reply is not a complete line if it timed out, the process ended, or it exceeds `max_bytes` bytes.
        """
        deadline, remaining = time.monotonic() + timeout, memoryview(line)
        try:
            while remaining:
                if not _wait_ready(self._stdin, select.POLLOUT, deadline):
                    return b"", True
                # unbuffered: a fork would write the buffer again
                remaining = remaining[os.write(self._stdin, remaining) :]
            end = self._buffer.find(b"\n")
            while end < 0 and len(self._buffer) < max_bytes:
                if not _wait_ready(self._stdout, select.POLLIN, deadline):
                    return b"", True
                if not (chunk := os.read(self._stdout, READ_SIZE)):
                    break
                self._buffer += chunk
                end = self._buffer.find(b"\n", len(self._buffer) - len(chunk))
        except OSError:
            return b"", False
        reply = bytes(self._buffer[: max_bytes if end < 0 else min(end + 1, max_bytes)])
        del self._buffer[: len(reply)]
        return reply, False


def _wait_ready(fd: int, event: int, deadline: float) -> bool:
    """Wait until the pipe can be read or written; False if the deadline passed first."""
    remaining = deadline - time.monotonic()
    return not HAS_POLL or (remaining > 0 and _poll_event(fd, event, remaining))


def _poll_event(fd: int, event: int, timeout: float) -> bool:
    """Whether `event` occurs within `timeout` seconds, or the other end of the pipe is closed."""
    poll = select.poll()
    poll.register(fd, event)
    return bool(poll.poll(timeout * 1000))
