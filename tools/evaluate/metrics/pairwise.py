"""Answers compared two by two by a judge: each row's with plain decoding's and with the best prompt's."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from .scoring import answer_of
from .table import pooled

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..scorers.answer import Answer
    from ..study.answers_file import Answers
    from ..study.row import Row
    from ..study.study import Study
    from .score_cache import Comparer, Kept
    from .statistics import Array
    from .table import Table

WORTH = {"win": 1.0, "tie": 0.5, "lose": 0.0, None: math.nan}

Judged = dict[str, dict[str, "Array"]]
"""By row and reference, how often the row won: [weights, questions], NaN where it cannot be said."""


def judged(table: Table, answers: Answers, judge: Comparer, kept: Kept) -> Judged:
    """Every row against every reference, at each weight by the wishes with their weights."""
    study = table.study
    return {
        row.label: {
            name: _against(study, answers, row, table.best(rows), judge, kept)
            for name, rows in table.references.items()
        }
        for row in study.rows
    }


def _against(
    study: Study, answers: Answers, row: Row, others: Sequence[Row], judge: Comparer, kept: Kept
) -> Array:
    """`others` has the reference's row at each weight."""
    pairs: list[tuple[Answer, Answer]] = []
    for number in range(len(study.weights)):
        mine = _said(study, answers, row, number)
        pairs += zip(mine, _said(study, answers, others[number], number), strict=True)
    outcomes = [WORTH[outcome] for outcome in kept.comparisons(judge, pairs)]
    shape = len(study.weights), len(study.questions), study.settings.params.n
    return pooled(np.array(outcomes).reshape(shape), axis=-1)


def _said(study: Study, answers: Answers, row: Row, number: int) -> list[Answer]:
    """All answers of a row at a weight, question after question."""
    weights = study.weights[number]
    return [
        answer_of(record, question.text, tuple(aim.wish(question) for aim in study.aims), weights)
        for question in study.questions
        for record in answers[study.key(row, weights, question)]
    ]
