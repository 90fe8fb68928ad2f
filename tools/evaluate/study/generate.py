"""Generate the missing answers of a study in one batch; each is written when it finishes."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

from ....kernels.common.errors import InputError
from ...cli import formatting, open_engine
from ...cli.display import progress
from ...cli.terminal import log_line
from ...common.run_many import generate_many
from . import answer_record, answers_file

if TYPE_CHECKING:
    from pathlib import Path

    from .answers_file import Answers
    from .study import Study


def generate_missing(study: Study, answers: Answers, path: Path) -> Answers:
    """Generate the answers not in `answers`, append them to the file, and return all."""
    cells = study.cells
    remaining = [cell for key, cell in cells.items() if key not in answers]
    if not remaining:
        return answers
    answers = dict(answers)
    log_line(f"{len(cells)} requests, of which {len(answers)} are answered in {str(path)!r}")
    engine = open_engine.open_async_engine(study.settings.engine_config)
    with ExitStack() as stack:
        stack.callback(engine.shutdown)
        answers_file.open_answers_file(path).truncate_partial()
        update_progress = stack.enter_context(progress("trimtab: answering …"))
        for cell, output in generate_many(engine, remaining, lambda cell: cell.request):
            if isinstance(output, InputError):
                location = f"question {cell.question.index} with {cell.label}"
                raise InputError(f"{location}: {output}", output.field)
            answers[cell.key] = [
                answer_record.record_from_output(cell, i, sample)
                for i, sample in enumerate(formatting.all_outputs(output))
            ]
            answers_file.append_answers(path, answers[cell.key])
            if update_progress:
                update_progress(len(answers), len(cells))
    return answers
