"""Answers to all that a study asks, decoded in one batch and written as they end."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from ....kernels.common.errors import InputError
from ...cli import formatting, open_engine
from ...cli.display import progress
from ...cli.terminal import say
from ...common.run_many import decoded
from . import answer_record, answers_file

if TYPE_CHECKING:
    from pathlib import Path

    from .answers_file import Answers
    from .study import Study


def complete(study: Study, done: Answers, path: Path) -> Answers:
    """All answers of the study: those that the file has, given as `done`, and those decoded now and added."""
    cells = study.cells
    left = [cell for key, cell in cells.items() if key not in done]
    if not left:
        return done
    done = dict(done)
    say(f"{len(cells)} requests, of which {len(done)} are answered in {str(path)!r}")
    engine = open_engine.open_async_engine(study.settings.config)
    with ExitStack() as ending:
        ending.callback(engine.shutdown)
        answers_file.of(path).cut()
        show = ending.enter_context(progress("trimtab: answering …"))
        for cell, output in decoded(engine, left, lambda cell: cell.request):
            if isinstance(output, InputError):
                where = f"question {cell.question.index} with {cell.label}"
                raise InputError(f"{where}: {output}", output.field)
            done[cell.key] = [
                answer_record.of(cell, i, each) for i, each in enumerate(formatting.answers(output))
            ]
            answers_file.write(path, done[cell.key])
            if show:
                show(len(done), len(cells))
    return done
