"""One answer shown as it is decoded: to a person with live weights, to a pipe as plain text."""

from __future__ import annotations

import signal
import sys
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from . import terminal

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from types import FrameType

    from ...engine.engine import Engine
    from ...engine.outputs import Delta, Output
    from ...engine.request import Request


class View(Protocol):
    """Where an answer appears."""

    def add(self, delta: Delta) -> None:
        """Shows a piece."""

    def finish(self, caption: str) -> None:
        """Ends the answer; `caption` is for people."""


class PlainAnswer:
    """The text alone, and a newline at its end."""

    def __init__(self) -> None:
        self._ended = False

    def add(self, delta: Delta) -> None:
        """Writes a piece at once."""
        sys.stdout.write(terminal.safe(delta.text))
        sys.stdout.flush()
        self._ended = delta.text.endswith("\n") if delta.text else self._ended

    def finish(self, caption: str) -> None:
        """Ends the last line; the caption is not for a pipe."""
        if not self._ended:
            sys.stdout.write("\n")
        sys.stdout.flush()


@contextmanager
def view(request: Request) -> Iterator[View]:
    """Where this request's answer appears: live for a person, plain for a pipe."""
    if not terminal.watched():
        yield PlainAnswer()
        return
    from . import display  # noqa: PLC0415 - rich is for a terminal

    wishes = request.steering.branches() if request.trace and request.steering.wishes == "many" else ()
    live = display.LiveAnswer(display.screen(), wishes)
    live.start()
    try:
        yield live
    finally:
        live.stop()


def pieces(engine: Engine, request: Request, stopped: Callable[[], bool] = lambda: False) -> Iterator[Delta]:
    """The deltas of a request until `stopped()`; the request is aborted when they are left early."""
    stream: Iterable[Delta] = engine.stream(request)
    try:
        for delta in stream:
            yield delta
            if stopped():
                return
    finally:
        close = getattr(stream, "close", None)
        if close is not None:
            close()


def error_of(output: Output) -> str | None:
    """Why an answer failed, in a sentence; None when it did not."""
    if output.finish_reason != "error":
        return None
    return output.error or "the answer failed and the engine did not say why"


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Within, the first Ctrl-C only makes the yielded function true, so a step is never cut in half."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    pressed = threading.Event()

    def note(number: int, frame: FrameType | None) -> None:
        if pressed.is_set():
            raise KeyboardInterrupt
        pressed.set()

    before = signal.signal(signal.SIGINT, note)
    try:
        yield pressed.is_set
    finally:
        signal.signal(signal.SIGINT, before)
