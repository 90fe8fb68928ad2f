"""Terminal output with rich: progress bar, live answer with weight bars, columns of answers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from .terminal import escape

if TYPE_CHECKING:
    from ...engine.outputs import Delta

ProgressCallback = Callable[[int, int], None]
MAX_LABEL_WIDTH = 44
BAR_WIDTH = 20


def make_console() -> Console:
    """A rich console on stdout."""
    return Console(highlight=False)


@contextmanager
def progress(label: str) -> Iterator[ProgressCallback | None]:
    """Yield a callback (done, total) for a progress bar on stderr; None if stderr is not a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    bar = Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )
    with bar:
        task = bar.add_task(escape(label), total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


class AskedObjective(NamedTuple):
    """An objective's text and the weight that was asked."""

    text: str
    weight: float


class LiveView:
    """An answer while it is decoded, with a bar below for each objective: its fulfilment beside its weight.

    Complete lines are printed once and scroll away; only the last line and the bars are redrawn, so an answer
    may be longer than the screen.
    """

    def __init__(self, console: Console, objectives: Sequence[AskedObjective] = ()) -> None:
        self._console = console
        self._objectives = objectives
        self._fulfilment: list[float | None] = []
        self._line = ""
        self._live = Live(console=console, refresh_per_second=12, vertical_overflow="crop")

    def start(self) -> None:
        """Start drawing at the bottom of the screen."""
        self._live.start()

    def stop(self) -> None:
        """Stop drawing and leave the screen as it is. Idempotent."""
        self._live.stop()

    def add(self, delta: Delta) -> None:
        """Show a delta of the answer and the fulfilment at its last token."""
        if delta.trace and delta.trace.fulfilment:
            self._fulfilment = delta.trace.fulfilment[-1]
        self._line += escape(delta.text).expandtabs(4)
        *complete, self._line = wrap_lines(self._line, self._console)
        for line in complete:
            self._live.console.print(Text(line))
        self._live.update(self._render())

    def finish(self, caption: str) -> None:
        """Show the final fulfilment and the caption, and stop drawing."""
        self._live.update(Group(self._render(), Text(caption, style="dim")), refresh=True)
        self._live.stop()

    def _render(self) -> RenderableType:
        if not self._objectives or len(self._fulfilment) != len(self._objectives):
            return Text(self._line)
        return Group(Text(self._line), fulfilment_bars(self._objectives, self._fulfilment))


def wrap_lines(text: str, console: Console) -> list[str]:
    """The lines of a text wrapped to the console width; the last one may still grow."""
    lines: list[str] = []
    *paragraphs, last = text.split("\n")
    for paragraph in paragraphs:
        lines += [line.plain for line in Text(paragraph).wrap(console, console.width)] or [""]
    *complete, tail = [line.plain for line in Text(last).wrap(console, console.width)] or [""]
    # Wrapping strips trailing spaces; the last line must keep them, because more text follows it.
    return [*lines, *complete, last[last.rindex(tail) :]]


def fulfilment_bars(objectives: Sequence[AskedObjective], fulfilment: Sequence[float | None]) -> Table:
    """A table with one row for each objective: its text, a bar of its fulfilment, and both numbers."""
    table = Table.grid(padding=(0, 1))
    table.add_column(max_width=MAX_LABEL_WIDTH, no_wrap=True, overflow="ellipsis")
    table.add_column(width=BAR_WIDTH)
    table.add_column(no_wrap=True)
    for objective, reached in zip(objectives, fulfilment, strict=True):
        filled = min(max(reached or 0.0, 0.0), 1.0)
        bar = ProgressBar(total=1.0, completed=filled, width=BAR_WIDTH, finished_style="bar.complete")
        numbers = f"asked {objective.weight:.2f}" + ("" if reached is None else f", reached {reached:.2f}")
        table.add_row(Text(escape(" ".join(objective.text.split())), style="dim"), bar, Text(numbers))
    return table


@dataclass
class AnswerColumn:
    """One method's answer: its text so far, and the caption."""

    text: str = ""
    caption: str = ""


class LiveColumns:
    """Answers side by side, redrawn while the current one grows."""

    def __init__(self, live: Live, labels: Sequence[str]) -> None:
        self._live = live
        self._columns = {label: AnswerColumn() for label in labels}
        self._current = labels[0]

    def begin(self, label: str) -> None:
        """Make this column the current one."""
        self._current = label

    def add(self, text: str) -> None:
        """Append text to the current column."""
        self._columns[self._current].text += text
        self._live.update(self.render())

    def end(self, caption: str) -> None:
        """Set the caption of the current column."""
        self._columns[self._current].caption = caption
        self._live.update(self.render())

    def render(self) -> Table:
        """The table of columns: label, text, caption. Generated text is never interpreted as markup."""
        table = Table(expand=True, show_footer=True)
        for label, column in self._columns.items():
            header, footer = Text(label, style="bold"), Text(escape(column.caption), style="dim")
            table.add_column(header, footer, ratio=1, overflow="fold")
        table.add_row(*(Text(escape(column.text)) for column in self._columns.values()))
        return table


@contextmanager
def open_columns(console: Console, labels: Sequence[str]) -> Iterator[LiveColumns]:
    """Yield live columns; at the end print the full table, also when it is taller than the screen."""
    live = Live(console=console, refresh_per_second=8, transient=True, vertical_overflow="crop")
    columns = LiveColumns(live, labels)
    try:
        with live:
            yield columns
    finally:
        console.print(columns.render())
