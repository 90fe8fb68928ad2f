"""Answers to all that a study asks, decoded in one batch and written as they end."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from ...kernels.errors import InputError
from .. import loading, report
from ..crowd import decoded
from ..display import progress
from ..plain import say
from . import ledger, record

if TYPE_CHECKING:
    from pathlib import Path

    from .ledger import Answers
    from .study import Study


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
        ledger.of(path).cut()
        show = ending.enter_context(progress("trimtab: answering …"))
        for cell, output in decoded(engine, left, lambda cell: cell.request):
            if isinstance(output, InputError):
                where = f"question {cell.question.index} with {cell.label}"
                raise InputError(f"{where}: {output}", output.field)
            done[cell.key] = [record.of(cell, i, each) for i, each in enumerate(report.answers(output))]
            ledger.write(path, done[cell.key])
            if show:
                show(len(done), len(cells))
    return done
