"""Answers to all that a study asks, decoded in one batch and written as they end."""

from __future__ import annotations

from collections import deque
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import ExitStack
from typing import TYPE_CHECKING

from ...kernels.errors import InputError
from .. import loading, report
from ..display import progress
from ..plain import say
from . import ledger, lines, record

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator
    from pathlib import Path

    from ...engine.async_engine import AsyncEngine
    from ...engine.output import Output
    from .ledger import Answers
    from .study import Cell, Study


def complete(study: Study, done: Answers, path: Path) -> Answers:
    """All answers of the study: those that the file has, given as `done`, and those decoded now and added."""
    cells = study.cells
    left = [cell for key, cell in cells.items() if key not in done]
    if not left:
        return done
    done = dict(done)
    say(f"{len(cells)} requests, of which {len(done)} are answered in {str(path)!r}")
    engine = loading.open_async_engine(study.settings.config)
    with ExitStack() as ending:
        ending.callback(engine.shutdown)
        lines.cut(path)
        file = ending.enter_context(path.open("a", encoding="utf-8"))
        show = ending.enter_context(progress("trimtab: answering …"))
        for cell, output in decoded(engine, left):
            done[cell.key] = [record.of(cell, i, each) for i, each in enumerate(report.answers(output))]
            ledger.write(file, done[cell.key])
            if show:
                show(len(done), len(cells))
    return done


def decoded(engine: AsyncEngine, cells: Iterable[Cell]) -> Iterator[tuple[Cell, Output]]:
    """Each cell's output as it ends. Twice what fits the engine is under way, so that the batch stays full.

    Raises InputError when a request cannot be decoded, such as a prompt that is too long.
    """
    running: dict[Future[Output], Cell] = {}
    waiting = deque(cells)
    width = min(2 * engine.config.max_num_seqs, engine.config.max_waiting)
    while waiting or running:
        while waiting and len(running) < width:
            cell = waiting.popleft()
            running[_submitted(engine, cell)] = cell
        for ended in wait(running, return_when=FIRST_COMPLETED).done:
            yield running.pop(ended), ended.result()


def _submitted(engine: AsyncEngine, cell: Cell) -> Future[Output]:
    try:
        return engine.submit(cell.request)
    except InputError as error:
        raise InputError(f"question {cell.question.index} with {cell.label}: {error}", error.field) from None
