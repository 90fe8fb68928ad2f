"""Pairwise judgments: a judge compares each row's answers with base's and with the best prompt's."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from .scoring import to_answer
from .table import nan_mean

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..scorers.answer import Answer
    from ..study.answers_file import Answers
    from ..study.row import Row
    from ..study.study import Study
    from .score_cache import PairwiseJudge, ScoreCache
    from .statistics import Array
    from .table import ScoreTable

OUTCOME_SCORES = {"win": 1.0, "tie": 0.5, "lose": 0.0, None: math.nan}

Judgments = dict[str, dict[str, "Array"]]
"""By row and reference, the row's win score: [weights, questions], NaN without a verdict."""


def judge_rows(table: ScoreTable, answers: Answers, judge: PairwiseJudge, cache: ScoreCache) -> Judgments:
    """Judge every row against every reference, at each weight by the weighted objectives."""
    study = table.study
    return {
        row.label: {
            name: _win_scores(study, answers, row, table.best_rows(rows), judge, cache)
            for name, rows in table.reference_rows.items()
        }
        for row in study.rows
    }


def _win_scores(
    study: Study,
    answers: Answers,
    row: Row,
    reference_rows: Sequence[Row],
    judge: PairwiseJudge,
    cache: ScoreCache,
) -> Array:
    """Win scores [weights, questions]. `reference_rows`: the row to compare with at each weight."""
    pairs: list[tuple[Answer, Answer]] = []
    for weight_index in range(len(study.weights)):
        row_answers = _answers_at(study, answers, row, weight_index)
        pairs += zip(
            row_answers, _answers_at(study, answers, reference_rows[weight_index], weight_index), strict=True
        )
    outcomes = [OUTCOME_SCORES[outcome] for outcome in cache.get_comparisons(judge, pairs)]
    shape = len(study.weights), len(study.questions), study.settings.sampling_params.n
    return nan_mean(np.array(outcomes).reshape(shape), axis=-1)


def _answers_at(study: Study, answers: Answers, row: Row, weight_index: int) -> list[Answer]:
    """All answers of a row at a weight, grouped by question."""
    weights = study.weights[weight_index]
    return [
        to_answer(
            record, question.text, tuple(target.objective_text(question) for target in study.targets), weights
        )
        for question in study.questions
        for record in answers[study.answer_key(row, weights, question)]
    ]
