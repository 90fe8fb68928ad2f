"""A study from its requests to its report."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from ..cli.terminal import say
from . import scorers
from .metrics import pairwise, scoring, statistics
from .metrics.analysis import Analysis
from .metrics.ratings import SCALE
from .metrics.score_cache import Comparer, Kept
from .metrics.table import Table
from .report import plots, report
from .study import answers_file
from .study.generate import complete

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from .metrics.result import Result
    from .scorers import Scorer
    from .scorers.answer import Answer
    from .study.answers_file import Answers
    from .study.study import Study

ANSWERS = "answers.jsonl"
SCORES = "scores.jsonl"
COSTLY = ("judge", "reward")
"""Scorers whose scores are kept."""
BOOTSTRAP_SEED = 0


def conduct(study: Study, folder: Path) -> int:
    """Answers what is not answered, scores all, writes the report. 1 when an answer failed.

    Raises InputError, before the model is loaded, for scorers there are not and a folder of another study.
    """
    measures = {name: scorers.make(name) for name in study.scorers}
    plots.require()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ANSWERS
    before = answers_file.read(path, study.cells, study.settings.params.n)
    kept = Kept(folder / SCORES)
    report.begin(study, folder)
    answers = complete(study, before, path)
    report.write(study, _result(study, answers, measures, kept), folder, BOOTSTRAP_SEED)
    print(folder / "report.md")
    failed = sum(record.error is not None for records in answers.values() for record in records)
    if failed:
        say(f"{failed} answers failed; {str(path)!r} says why")
    return 1 if failed else 0


def _result(study: Study, answers: Answers, measures: Mapping[str, Scorer], kept: Kept) -> Result:
    def score(name: str, given: list[Answer]) -> list[float | None]:
        scorer = measures[name]
        return kept.scores(scorer, given) if name.partition(":")[0] in COSTLY else scorer.score(given)

    counts = statistics.resampled(len(study.questions), seed=BOOTSTRAP_SEED)
    table = Table(study, scoring.scores(study, answers, score), counts)
    judge = study.settings.pairwise
    judged = pairwise.judged(table, answers, cast("Comparer", measures[judge]), kept) if judge else {}
    marked = all(measures[aim.scorer].scale == SCALE and aim.sign > 0 for aim in study.aims)
    return Analysis(table, marked, judged).result()
