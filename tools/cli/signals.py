"""SIGINT and SIGTERM handlers of the command line."""

from __future__ import annotations

import os
import signal
import sys
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

INTERRUPTED, TERMINATED = 130, 143
"""Exit status: 128 plus the signal's number, as in shells."""


@contextmanager
def terminable() -> Iterator[None]:
    """Make SIGINT and SIGTERM raise an exception inside the block, so that cleanup runs.

    Incomplete files are removed, and a running pip is ended. During an import they end the program at once:
    C extensions may drop an exception raised there, so that the program continues, or abort. A SIGINT that is
    ignored, as in a background job, stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set signal handlers
        return
    previous = {signal.SIGTERM: signal.signal(signal.SIGTERM, _on_signal)}
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        previous[signal.SIGINT] = signal.signal(signal.SIGINT, _on_signal)
    try:
        yield
    finally:
        for signum, handler in previous.items():
            signal.signal(signum, handler)


def _on_signal(signum: int, _: FrameType | None) -> None:
    status = INTERRUPTED if signum == signal.SIGINT else TERMINATED
    if _is_importing():
        os._exit(status)
    raise KeyboardInterrupt if signum == signal.SIGINT else SystemExit(status)


def _is_importing() -> bool:
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False
