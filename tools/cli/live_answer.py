"""Show one answer while it is decoded: with live weights on a terminal, as plain text in a pipe."""

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
    """Displays one answer."""

    def add(self, delta: Delta) -> None:
        """Show a delta."""

    def finish(self, caption: str) -> None:
        """End the answer; `caption` is shown on terminals only."""


class PlainView:
    """Writes the text only, with a newline at its end."""

    def __init__(self) -> None:
        self._at_line_start = False

    def add(self, delta: Delta) -> None:
        """Write a delta and flush."""
        sys.stdout.write(terminal.escape(delta.text))
        sys.stdout.flush()
        self._at_line_start = delta.text.endswith("\n") if delta.text else self._at_line_start

    def finish(self, caption: str) -> None:
        """End the last line; the caption is not written."""
        if not self._at_line_start:
            sys.stdout.write("\n")
        sys.stdout.flush()


@contextmanager
def open_view(request: Request) -> Iterator[View]:
    """Yield the view for a request's answer: live on a terminal, plain otherwise."""
    if not terminal.is_tty():
        yield PlainView()
        return
    from . import display  # noqa: PLC0415 - rich is needed on a terminal only

    method = request.steering
    objectives = method.branch_objectives() if request.trace and method.objective_arity == "many" else ()
    asked = [display.AskedObjective(*each) for each in zip(objectives, method.weights(), strict=False)]
    live_view = display.LiveView(display.make_console(), asked)
    live_view.start()
    try:
        yield live_view
    finally:
        live_view.stop()


def iter_deltas(
    engine: Engine, request: Request, should_stop: Callable[[], bool] = lambda: False
) -> Iterator[Delta]:
    """Yield the deltas of a request until `should_stop()`; ending early aborts the request."""
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
    """The error message of a failed output; None if it did not fail."""
    if output.finish_reason != "error":
        return None
    return output.error or "the answer failed for an unknown reason"


@contextmanager
def catch_interrupt() -> Iterator[Callable[[], bool]]:
    """Make the first Ctrl-C only set the yielded flag function to True; a second one interrupts.

    A single Ctrl-C therefore never interrupts a step halfway.
    """
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
