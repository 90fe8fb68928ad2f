"""Run a study: generate the missing answers, score all, write the report."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from ..cli.terminal import log_line
from . import scorers
from .metrics import pairwise, scoring, statistics
from .metrics.analysis import Analysis
from .metrics.ratings import RATING_SCALE
from .metrics.score_cache import PairwiseJudge, ScoreCache
from .metrics.table import ScoreTable
from .report import report
from .study import answers_file
from .study.generate import generate_missing

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from .metrics.result import Result
    from .scorers import Scorer
    from .scorers.answer import Answer
    from .study.answers_file import Answers
    from .study.study import Study

ANSWERS_FILE = "answers.jsonl"
SCORES_FILE = "scores.jsonl"
CACHED_SCORERS = ("judge", "reward")
"""Scorers slow enough that their scores are cached on disk."""
BOOTSTRAP_SEED = 0


def run_study(study: Study, folder: Path) -> int:
    """Generate missing answers, score all, write the report. Return 1 if an answer failed.

    Raises InputError, before the model is loaded, for an unknown scorer or a folder of another study.
    """
    scorers_by_name = {name: scorers.make_scorer(name) for name in study.scorers}
    scorers.require_packages("the report", "matplotlib", "scipy")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ANSWERS_FILE
    answers_file.unpack(path)
    previous = answers_file.read_answers(path, study.cells, study.settings.sampling_params.n)
    cache = ScoreCache(folder / SCORES_FILE)
    report.write_study_file(study, folder)
    answers = generate_missing(study, previous, path)
    answers_file.pack(path)
    result = _compute_result(study, answers, scorers_by_name, cache)
    report.write_report(study, result, answers, folder, BOOTSTRAP_SEED)
    print(folder / "report.md")
    num_failed = sum(record.error is not None for records in answers.values() for record in records)
    if num_failed:
        log_line(f"{num_failed} answers failed; the errors are in {str(path)!r}")
    return 1 if num_failed else 0


def _compute_result(
    study: Study, answers: Answers, scorers_by_name: Mapping[str, Scorer], cache: ScoreCache
) -> Result:
    def score(name: str, batch: list[Answer]) -> list[float | None]:
        scorer = scorers_by_name[name]
        return (
            cache.get_scores(scorer, batch)
            if name.partition(":")[0] in CACHED_SCORERS
            else scorer.score(batch)
        )

    counts = statistics.bootstrap_counts(len(study.questions), seed=BOOTSTRAP_SEED)
    table = ScoreTable(study, scoring.compute_scores(study, answers, score), counts)
    judge_name = study.settings.pairwise
    judgments = (
        pairwise.judge_rows(table, answers, cast("PairwiseJudge", scorers_by_name[judge_name]), cache)
        if judge_name
        else {}
    )
    has_ratings = all(
        scorers_by_name[target.scorer].scale == RATING_SCALE and target.sign > 0 for target in study.targets
    )
    return Analysis(table, has_ratings, judgments).compute()
