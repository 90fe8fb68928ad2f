"""Score all answers into arrays over weights and questions. No scorer sees how an answer was decoded."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from ..scorers.answer import Answer
from ..scorers.text import split_words

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ...common.questions import Question
    from ..study.answer_record import AnswerRecord
    from ..study.answers_file import Answers
    from ..study.grid import Weights
    from ..study.row import Row
    from ..study.study import Study
    from ..study.target import Target
    from .statistics import Array

ValuesByKey = dict[str, list[float]]
"""By cell key, a number for each of its n answers; NaN if missing."""


@dataclass(frozen=True)
class Scores:
    """Arrays [weights, questions, n] by row label.

    targets: for each objective, its scores with the sign applied: higher is better.
    extras:  scores by name of an extra scorer.
    facts:   by name: words, tokens, truncated (0 or 1), logprob, kl, strength.
    """

    targets: tuple[dict[str, Array], ...]
    extras: dict[str, dict[str, Array]]
    facts: dict[str, dict[str, Array]]


FACT_GETTERS: dict[str, Callable[[AnswerRecord], float | None]] = {
    "words": lambda record: float(len(split_words(record.text))),
    "tokens": lambda record: float(record.tokens),
    "truncated": lambda record: float(record.finish_reason == "length"),
    "logprob": lambda record: record.base_logprob,
    "kl": lambda record: record.kl,
    "strength": lambda record: record.strength,
}


ScoreFn = Callable[[str, list[Answer]], list[float | None]]
"""(scorer name, answers) -> scores."""


def compute_scores(study: Study, answers: Answers, score_fn: ScoreFn) -> Scores:
    """Score all answers for the study's objectives and by its extra scorers."""
    questions = {key: study.cells[key].question for key in answers}

    def to_arrays(values_by_key: ValuesByKey) -> dict[str, Array]:
        return {row.label: _to_array(study, row, values_by_key) for row in study.rows}

    def score_target(target: Target) -> dict[str, Array]:
        values = _score_answers(
            partial(score_fn, target.scorer), answers, lambda key: _target_context(target, questions[key])
        )
        return {label: target.sign * array for label, array in to_arrays(values).items()}

    def score_all(name: str) -> dict[str, Array]:
        return to_arrays(
            _score_answers(
                partial(score_fn, name),
                answers,
                lambda key: _all_targets_context(study.targets, questions[key]),
            )
        )

    return Scores(
        tuple(score_target(target) for target in study.targets),
        {name: score_all(name) for name in study.settings.extra_scorers},
        {name: to_arrays(_collect_facts(answers, get_fact)) for name, get_fact in FACT_GETTERS.items()},
    )


ScoreContext = tuple[str, tuple[str, ...], "Weights"]
"""A question's text, the objectives to score by, and the weight of each."""


def _target_context(target: Target, question: Question) -> ScoreContext:
    return question.text, (target.objective_text(question),), (1.0,)


def _all_targets_context(targets: Sequence[Target], question: Question) -> ScoreContext:
    return (
        question.text,
        tuple(target.objective_text(question) for target in targets),
        (1 / len(targets),) * len(targets),
    )


def _score_answers(
    score_fn: Callable[[list[Answer]], list[float | None]],
    answers: Answers,
    get_context: Callable[[str], ScoreContext],
) -> ValuesByKey:
    pairs = [(key, record) for key, records in answers.items() for record in records]
    scores = score_fn([to_answer(record, *get_context(key)) for key, record in pairs])
    values: ValuesByKey = {key: [] for key in answers}
    for (key, record), score in zip(pairs, scores, strict=True):
        values[key].append(_to_float(None if record.error else score))
    return values


def to_answer(record: AnswerRecord, question: str, objectives: tuple[str, ...], weights: Weights) -> Answer:
    """Convert a record to the scorers' input."""
    return Answer(
        question, objectives, weights, record.text, record.tokens, record.base_logprob, record.finish_reason
    )


def _collect_facts(answers: Answers, get_fact: Callable[[AnswerRecord], float | None]) -> ValuesByKey:
    return {
        key: [_to_float(None if record.error else get_fact(record)) for record in records]
        for key, records in answers.items()
    }


def _to_float(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _to_array(study: Study, row: Row, values_by_key: ValuesByKey) -> Array:
    """[weights, questions, n]."""
    return np.array(
        [
            [values_by_key[study.answer_key(row, weights, q)] for q in study.questions]
            for weights in study.weights
        ]
    )
