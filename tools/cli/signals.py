"""What SIGINT and SIGTERM do to the command."""

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
"""128 and the signal's number, as shells count."""


@contextmanager
def terminable() -> Iterator[None]:
    """Within, both end the program as an exception does: what is half made is removed, a pip is ended.

    Amid an import they end it at once. Packages written in C drop exceptions that they did not expect there,
    and the program would go on as if nobody had asked it to stop; or they abort. A SIGINT that is ignored, as
    in a job in the background, stays so.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may say what a signal does
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
