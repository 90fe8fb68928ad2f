"""Score table of a study: bootstrap means, score ranges, normalised scores, utilities."""

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
class ScoreTable:
    """A study with its scores. `counts` [draws, questions]: how often each question occurs in each draw.

    Scores of objectives are signed so that higher is better.
    """

    study: Study
    scores: Scores
    counts: Array

    @cached_property
    def weights(self) -> Array:
        """The requested weights: [weights, objectives]."""
        return np.array(self.study.weights)

    def answer_scores(self, row: Row) -> Array:
        """Scores of every answer: [objectives, weights, questions, n]."""
        return np.stack([target[row.label] for target in self.scores.targets])

    def is_fluent(self, row: Row, max_ratio: float | None) -> NDArray[np.bool_]:
        """Whether the row's median perplexity is at most `max_ratio` times base's: [weights].

        True everywhere without a `max_ratio` or without base.
        """
        base = [row for row in self.study.rows if row.method_spec.method is Base]
        if max_ratio is None or not base:
            return np.ones(len(self.study.weights), dtype=bool)
        fluent: NDArray[np.bool_] = self._median_nll(row) <= self._median_nll(base[0])[0] + np.log(max_ratio)
        return fluent

    def _median_nll(self, row: Row) -> Array:
        """The median over answers of the mean negative log-probability per token: [weights]."""
        values = -self.scores.facts["logprob"][row.label]
        flat = values.reshape(len(values), -1)
        valid = [line[~np.isnan(line)] for line in flat]
        return np.array([np.median(line) if len(line) else np.inf for line in valid])

    def mean_scores(self, row: Row) -> Array:
        """Mean scores in every draw: [draws, objectives, weights]."""
        return self._mean_scores_by_row[row.label]

    def is_counted(self, row: Row) -> NDArray[np.bool_]:
        """Whether the row is fluent enough (--fluent) to count: [weights]."""
        return self.is_fluent(row, self.study.settings.fluent)

    @cached_property
    def ranges(self) -> Array:
        """The worst and the best mean of all counted points: [2, objectives]."""
        counted = [self.mean_scores(row)[0][:, self.is_counted(row)] for row in self.study.rows]
        means = np.concatenate(counted, axis=1)  # [objectives, points]
        valid = [line[~np.isnan(line)] for line in means]
        bounds = [[line.min(), line.max()] if len(line) else [0.0, 0.0] for line in valid]
        return np.swapaxes(np.array(bounds, dtype=np.float64), 0, 1)

    def normalize(self, values: Array, axis: int) -> Array:
        """Scale values, objectives along `axis`, to 0 at the worst mean of all points and 1 at the best.

        All are 0 where all means are equal.
        """
        low, high = self.ranges
        moved = np.moveaxis(values, axis, -1)
        width = np.where(high > low, high - low, np.inf)
        result: Array = np.moveaxis((moved - low) / width, -1, axis)
        return result

    def distinct_points(self, row: Row) -> list[list[int]]:
        """Indices of the weights, grouped by equal answers of the row."""
        groups: dict[tuple[str, ...], list[int]] = {}
        for index, weights in enumerate(self.study.weights):
            keys = tuple(self.study.answer_key(row, weights, question) for question in self.study.questions)
            groups.setdefault(keys, []).append(index)
        return list(groups.values())

    def point_coords(self, row: Row) -> Array:
        """Normalised scores of the row's distinct points in every draw: [draws, points, objectives].

        NaN for points that do not count.
        """
        first_indices = [indices[0] for indices in self.distinct_points(row)]
        coords = np.where(self.is_counted(row), self.normalize(self.mean_scores(row), axis=1), np.nan)
        return np.swapaxes(coords[:, :, first_indices], 1, 2)

    @property
    def reference_rows(self) -> dict[str, list[Row]]:
        """The rows to compare with: `base`, and `prompt` in all its wordings."""
        methods = {"base": Base, "prompt": Prompt}
        rows_by_name = {
            name: [row for row in self.study.rows if row.method_spec.method is method]
            for name, method in methods.items()
        }
        return {name: rows for name, rows in rows_by_name.items() if rows}

    def best_rows(self, rows: Sequence[Row]) -> list[Row]:
        """The row with the highest mean utility at each weight."""
        best_indices = np.stack([self.mean_utility(row) for row in rows]).argmax(axis=0)
        return [rows[index] for index in best_indices]

    def utility(self, row: Row) -> Array:
        """The weighted mean of normalised scores, [weights, questions]; −∞ where missing or not counted."""
        scores = self.normalize(
            nan_mean(self.answer_scores(row), axis=-1), axis=0
        )  # [objectives, weights, questions]
        shares = self.weights.T[:, :, None]
        total = np.where(shares > 0, shares * scores, 0.0).sum(axis=0)
        return np.where(np.isnan(total) | ~self.is_counted(row)[:, None], -np.inf, total)

    def mean_utility(self, row: Row) -> Array:
        """The weighted mean of the points' normalised mean scores: [weights]."""
        scores = self.normalize(self.mean_scores(row)[0], axis=0)
        total = np.where(self.weights.T > 0, self.weights.T * scores, 0.0).sum(axis=0)
        return np.where(np.isnan(total) | ~self.is_counted(row), -np.inf, total)

    @cached_property
    def _mean_scores_by_row(self) -> dict[str, Array]:
        return {
            row.label: statistics.bootstrap_means(nan_mean(self.answer_scores(row), axis=-1), self.counts)
            for row in self.study.rows
        }


def nan_mean(values: Array, axis: int | tuple[int, ...]) -> Array:
    """The mean of the values that are not NaN, along `axis`; NaN if there are none."""
    valid = ~np.isnan(values)
    count = valid.sum(axis=axis)
    total = np.where(valid, values, 0.0).sum(axis=axis)
    return statistics.safe_divide(total, count)
