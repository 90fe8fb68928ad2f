"""Scores as arrays that results are made from: means of every draw, the range of all, normalised values."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from ....engine.methods.builtin import Base, Prompt
from . import statistics

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from ..study.row import Row
    from ..study.study import Study
    from .scoring import Scores
    from .statistics import Array


@dataclass(frozen=True)
class Table:
    """A study with its scores, and `counts` [draws, questions]: how often each question is in each draw.

    Aims' values are oriented: higher is better.
    """

    study: Study
    scores: Scores
    counts: Array

    @cached_property
    def weights(self) -> Array:
        """What was asked for: [weights, aims]."""
        return np.array(self.study.weights)

    def answers(self, row: Row) -> Array:
        """Scores of every answer: [aims, weights, questions, n]."""
        return np.stack([aim[row.label] for aim in self.scores.aims])

    def fluent(self, row: Row, times: float | None) -> NDArray[np.bool_]:
        """At which weights the row's median perplexity is at most so many times base's: [weights].

        Everywhere, where there is nothing to compare with.
        """
        base = [row for row in self.study.rows if row.choice.method is Base]
        if times is None or not base:
            return np.ones(len(self.study.weights), dtype=bool)
        found: NDArray[np.bool_] = self._surprise(row) <= self._surprise(base[0])[0] + np.log(times)
        return found

    def _surprise(self, row: Row) -> Array:
        """The median over answers of the mean negative log-probability of a token: [weights]."""
        values = -self.scores.facts["logprob"][row.label]
        flat = values.reshape(len(values), -1)
        known = [line[~np.isnan(line)] for line in flat]
        return np.array([np.median(line) if len(line) else np.inf for line in known])

    def drawn(self, row: Row) -> Array:
        """Mean scores in every draw: [draws, aims, weights]."""
        return self._drawn[row.label]

    def counted(self, row: Row) -> NDArray[np.bool_]:
        """At which weights the row counts: [weights]."""
        return self.fluent(row, self.study.settings.fluent)

    @cached_property
    def ranges(self) -> Array:
        """The worst and the best mean of all points that count, by aim: [2, aims]."""
        counted = [self.drawn(row)[0][:, self.counted(row)] for row in self.study.rows]
        found = np.concatenate(counted, axis=1)  # [aims, points]
        known = [line[~np.isnan(line)] for line in found]
        ends = [[line.min(), line.max()] if len(line) else [0.0, 0.0] for line in known]
        return np.swapaxes(np.array(ends, dtype=np.float64), 0, 1)

    def normalised(self, values: Array, axis: int) -> Array:
        """0 at the worst mean of all points and 1 at the best, for values with the aims along `axis`.

        Where all means are equal nothing can be told apart, and all are 0.
        """
        low, high = self.ranges
        moved = np.moveaxis(values, axis, -1)
        width = np.where(high > low, high - low, np.inf)
        found: Array = np.moveaxis((moved - low) / width, -1, axis)
        return found

    def points(self, row: Row) -> list[list[int]]:
        """The weights by number, those together for which the row gives the same answers."""
        found: dict[tuple[str, ...], list[int]] = {}
        for number, weights in enumerate(self.study.weights):
            keys = tuple(self.study.key(row, weights, question) for question in self.study.questions)
            found.setdefault(keys, []).append(number)
        return list(found.values())

    def places(self, row: Row) -> Array:
        """Where the row's different points are in every draw, normalised: [draws, points, aims].

        NaN for those that do not count.
        """
        first = [numbers[0] for numbers in self.points(row)]
        found = np.where(self.counted(row), self.normalised(self.drawn(row), axis=1), np.nan)
        return np.swapaxes(found[:, :, first], 1, 2)

    @property
    def references(self) -> dict[str, list[Row]]:
        """What rows are compared with: plain decoding, and a prompt in all its wordings."""
        methods = {"base": Base, "prompt": Prompt}
        found = {
            name: [row for row in self.study.rows if row.choice.method is method]
            for name, method in methods.items()
        }
        return {name: rows for name, rows in found.items() if rows}

    def best(self, rows: Sequence[Row]) -> list[Row]:
        """At each weight that one of the rows whose means are worth most there."""
        chosen = np.stack([self.mean_worth(row) for row in rows]).argmax(axis=0)
        return [rows[number] for number in chosen]

    def worth(self, row: Row) -> Array:
        """The weighted mean of normalised scores, [weights, questions]; −∞ where unknown or not counted."""
        scores = self.normalised(pooled(self.answers(row), axis=-1), axis=0)  # [aims, weights, questions]
        shares = self.weights.T[:, :, None]
        found = np.where(shares > 0, shares * scores, 0.0).sum(axis=0)
        return np.where(np.isnan(found) | ~self.counted(row)[:, None], -np.inf, found)

    def mean_worth(self, row: Row) -> Array:
        """The weighted mean of the points' normalised means: [weights]."""
        scores = self.normalised(self.drawn(row)[0], axis=0)
        found = np.where(self.weights.T > 0, self.weights.T * scores, 0.0).sum(axis=0)
        return np.where(np.isnan(found) | ~self.counted(row), -np.inf, found)

    @cached_property
    def _drawn(self) -> dict[str, Array]:
        return {
            row.label: statistics.means(pooled(self.answers(row), axis=-1), self.counts)
            for row in self.study.rows
        }


def pooled(values: Array, axis: int | tuple[int, ...]) -> Array:
    """The mean along axes of what is known; NaN where nothing is."""
    known = ~np.isnan(values)
    number = known.sum(axis=axis)
    total = np.where(known, values, 0.0).sum(axis=axis)
    return statistics.quotient(total, number)
