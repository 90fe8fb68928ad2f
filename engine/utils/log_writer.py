"""Write log lines from a thread of their own, so that a log that nobody reads does not stop the server."""

from __future__ import annotations

import logging
import os
import threading
from collections import deque

MAX_LINES = 10_000
"""Log lines that wait to be written; further ones are dropped and counted."""


class LogWriter(logging.Handler):
    """Writes to a file descriptor, such as that of stdout, and never blocks the caller.

    While the reader of a pipe does not read, lines wait, and beyond `max_lines` they are dropped; once it
    reads again, a line says how many. If the log is closed, one line on `errors_fd` says so, and nothing more
    is written.
    """

    def __init__(self, fd: int, errors_fd: int = 2, max_lines: int = MAX_LINES) -> None:
        super().__init__()
        self._fd, self._errors_fd, self._max_lines = fd, errors_fd, max_lines
        self._lines: deque[str] = deque()
        self._num_dropped, self._is_closed = 0, False
        self._changed = threading.Condition()
        self._is_idle = True
        # a daemon: a write that nobody reads must not keep the process alive
        threading.Thread(target=self._run, name="log writer", daemon=True).start()

    def emit(self, record: logging.LogRecord) -> None:
        """Queue a line; called by `logging`."""
        try:
            line = self.format(record)
        except Exception:
            self.handleError(record)
            return
        with self._changed:
            if self._is_closed:
                return
            if len(self._lines) >= self._max_lines:
                self._num_dropped += 1
                return
            self._lines.append(line)
            self._changed.notify_all()

    def flush_for(self, seconds: float) -> bool:
        """Wait until all lines are written, for at most `seconds`; whether they are."""
        with self._changed:
            return self._changed.wait_for(
                lambda: self._is_closed or (self._is_idle and not self._lines), seconds
            )

    def _run(self) -> None:
        while True:
            with self._changed:
                self._is_idle = True
                self._changed.notify_all()
                self._changed.wait_for(lambda: bool(self._lines))
                self._is_idle = False
                text = "".join(f"{line}\n" for line in self._lines)
                self._lines.clear()
                if self._num_dropped:
                    text += f"trimtab: {self._num_dropped} log lines were dropped; the log was not read\n"
                    self._num_dropped = 0
            try:
                _write(self._fd, text.encode(errors="backslashreplace"))
            except OSError as error:
                self._close(error)
                return

    def _close(self, error: OSError) -> None:
        with self._changed:
            self._is_closed = True
            self._lines.clear()
            self._changed.notify_all()
        message = f"trimtab: the log cannot be written ({error.strerror}); requests are no longer logged\n"
        try:
            _write(self._errors_fd, message.encode())
        except OSError:
            return  # stderr is closed, too


def _write(fd: int, data: bytes) -> None:
    """Write all of it, past Python's buffers, whose locks a blocked write would keep at exit."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
