"""Scores of all answers, as arrays over points and questions. No scorer sees how an answer was decoded."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from ..scorers.answer import Answer
from ..scorers.text import words

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ...common.questions import Question
    from ..study.answer_record import Record
    from ..study.answers_file import Answers
    from ..study.grid import Weights
    from ..study.row import Row
    from ..study.study import Study
    from ..study.target import Aim
    from .statistics import Array

Measure = dict[str, list[float]]
"""By key, a number for each of the n answers; NaN where it cannot be said."""


@dataclass(frozen=True)
class Scores:
    """What was measured. Arrays are [weights, questions, n]; one for each row by its label.

    aims:   for each aim the scores by its scorer, higher is better: the sign is applied.
    extras: by name of a further scorer.
    facts:  by name: words, tokens, truncated (0 or 1), logprob, kl, strength.
    """

    aims: tuple[dict[str, Array], ...]
    extras: dict[str, dict[str, Array]]
    facts: dict[str, dict[str, Array]]


FACTS: dict[str, Callable[[Record], float | None]] = {
    "words": lambda record: float(len(words(record.text))),
    "tokens": lambda record: float(record.tokens),
    "truncated": lambda record: float(record.finish_reason == "length"),
    "logprob": lambda record: record.base_logprob,
    "kl": lambda record: record.kl,
    "strength": lambda record: record.strength,
}


Say = Callable[[str, list[Answer]], list[float | None]]
"""What a scorer, by the name it was asked for, says of answers."""


def scores(study: Study, answers: Answers, say: Say) -> Scores:
    """Everything that the study's aims and further scorers say."""
    asked = {key: study.cells[key].question for key in answers}

    def arranged(measure: Measure) -> dict[str, Array]:
        return {row.label: _array(study, row, measure) for row in study.rows}

    def by_aim(aim: Aim) -> dict[str, Array]:
        found = _measured(partial(say, aim.scorer), answers, lambda key: _only(aim, asked[key]))
        return {label: aim.sign * array for label, array in arranged(found).items()}

    def by_all(name: str) -> dict[str, Array]:
        return arranged(_measured(partial(say, name), answers, lambda key: _all(study.aims, asked[key])))

    return Scores(
        tuple(by_aim(aim) for aim in study.aims),
        {name: by_all(name) for name in study.settings.extras},
        {name: arranged(_facts(answers, fact)) for name, fact in FACTS.items()},
    )


Asked = tuple[str, tuple[str, ...], "Weights"]
"""A question's text, the wishes to score by, and the weight of each."""


def _only(aim: Aim, question: Question) -> Asked:
    return question.text, (aim.wish(question),), (1.0,)


def _all(aims: Sequence[Aim], question: Question) -> Asked:
    return question.text, tuple(aim.wish(question) for aim in aims), (1 / len(aims),) * len(aims)


def _measured(
    say: Callable[[list[Answer]], list[float | None]], answers: Answers, asked: Callable[[str], Asked]
) -> Measure:
    flat = [(key, record) for key, records in answers.items() for record in records]
    given = say([answer_of(record, *asked(key)) for key, record in flat])
    found: Measure = {key: [] for key in answers}
    for (key, record), score in zip(flat, given, strict=True):
        found[key].append(_number(None if record.error else score))
    return found


def answer_of(record: Record, question: str, wishes: tuple[str, ...], weights: Weights) -> Answer:
    """A record as scorers see it."""
    return Answer(
        question, wishes, weights, record.text, record.tokens, record.base_logprob, record.finish_reason
    )


def _facts(answers: Answers, fact: Callable[[Record], float | None]) -> Measure:
    return {
        key: [_number(None if record.error else fact(record)) for record in records]
        for key, records in answers.items()
    }


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _array(study: Study, row: Row, measure: Measure) -> Array:
    """[weights, questions, n]."""
    return np.array(
        [[measure[study.key(row, weights, q)] for q in study.questions] for weights in study.weights]
    )
