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


class PlainView:
    """The text alone, and a newline at its end."""

    def __init__(self) -> None:
        self._at_line_start = False

    def add(self, delta: Delta) -> None:
        """Writes a piece at once."""
        sys.stdout.write(terminal.escape(delta.text))
        sys.stdout.flush()
        self._at_line_start = delta.text.endswith("\n") if delta.text else self._at_line_start

    def finish(self, caption: str) -> None:
        """Ends the last line; the caption is not for a pipe."""
        if not self._at_line_start:
            sys.stdout.write("\n")
        sys.stdout.flush()


@contextmanager
def open_view(request: Request) -> Iterator[View]:
    """Where this request's answer appears: live for a person, plain for a pipe."""
    if not terminal.is_tty():
        yield PlainView()
        return
    from . import display  # noqa: PLC0415 - rich is for a terminal

    objectives = (
        request.steering.branch_objectives()
        if request.trace and request.steering.objective_arity == "many"
        else ()
    )
    live_view = display.LiveView(display.make_console(), objectives)
    live_view.start()
    try:
        yield live_view
    finally:
        live_view.stop()


def iter_deltas(
    engine: Engine, request: Request, should_stop: Callable[[], bool] = lambda: False
) -> Iterator[Delta]:
    """The deltas of a request until `stopped()`; the request is aborted when they are left early."""
    stream: Iterable[Delta] = engine.stream(request)
    try:
        for delta in stream:
            yield delta
            if should_stop():
                return
    finally:
        close = getattr(stream, "close", None)
        if close is not None:
            close()


def error_message(output: Output) -> str | None:
    """Why an answer failed, in a sentence; None when it did not."""
    if output.finish_reason != "error":
        return None
    return output.error or "the answer failed and the engine did not say why"


@contextmanager
def catch_interrupt() -> Iterator[Callable[[], bool]]:
    """Within, the first Ctrl-C only makes the yielded function true, so a step is never cut in half."""
    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    interrupted = threading.Event()

    def on_sigint(signum: int, frame: FrameType | None) -> None:
        if interrupted.is_set():
            raise KeyboardInterrupt
        interrupted.set()

    previous = signal.signal(signal.SIGINT, on_sigint)
    try:
        yield interrupted.is_set
    finally:
        signal.signal(signal.SIGINT, previous)
