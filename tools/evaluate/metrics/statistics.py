"""Means with bootstrap intervals, rank correlation, win rates: what the report's numbers are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Callable

Array = NDArray[np.float64]
NUM_DRAWS = 1000
COVERAGE_PERCENT = 95.0
"""Per cent of the draws that an interval covers."""


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval; None where there is none."""

    value: float | None
    low: float | None = None
    high: float | None = None


def bootstrap_counts(num_questions: int, seed: int = 0) -> Array:
    """How often each question is in each draw of as many with replacement: [1 + DRAWS, questions].

    Row 0 is the questions as they are. One such array serves all methods, so that their draws are the same.
    """
    rng = np.random.default_rng(seed)
    indices = rng.integers(0, num_questions, (NUM_DRAWS, num_questions))
    counts = np.stack([np.bincount(row, minlength=num_questions) for row in indices])
    return np.concatenate([np.ones((1, num_questions)), counts])


def bootstrap_means(scores: Array, counts: Array) -> Array:
    """Means over questions in each draw. scores: [..., questions] with NaN where unknown → [draws, ...].

    NaN where a draw has no known score.
    """
    valid = ~np.isnan(scores)
    total = np.tensordot(counts, np.where(valid, scores, 0.0), axes=(1, -1))
    count = np.tensordot(counts, valid.astype(float), axes=(1, -1))
    return safe_divide(total, count)


def safe_divide(numerator: Array, denominator: NDArray[Any]) -> Array:
    """total / number, NaN where the number is 0."""
    result = np.full(numerator.shape, np.nan)
    np.divide(numerator, denominator, out=result, where=denominator > 0)
    return result


def bootstrap_medians(scores: Array, counts: Array) -> Array:
    """The median of all scores in each draw. scores: [points, questions] with NaN where unknown → [draws].

    It is the lower of the middle two where there are two, as weighted medians are.
    """
    num_points, num_questions = scores.shape
    flat, question_index = scores.ravel(), np.tile(np.arange(num_questions), num_points)
    order = np.argsort(flat)[: int((~np.isnan(flat)).sum())]  # NaN sorts last
    if not len(order):
        return np.full(len(counts), np.nan)
    cumulative = np.cumsum(counts[:, question_index[order]], axis=1)
    median_index = (cumulative >= cumulative[:, -1:] / 2).argmax(axis=1)
    median = flat[order][median_index]
    return np.where(cumulative[:, -1] > 0, median, np.nan)


def estimate(draws: Array) -> Estimate:
    """Value and interval from [1 + draws] values, the first of the data as they are."""
    if not len(draws) or np.isnan(draws[0]):
        return Estimate(None)
    valid = draws[1:][~np.isnan(draws[1:])]
    if not len(valid):
        return Estimate(float(draws[0]))
    low, high = np.percentile(valid, [50 - COVERAGE_PERCENT / 2, 50 + COVERAGE_PERCENT / 2])
    return Estimate(float(draws[0]), float(low), float(high))


def map_draws(draws: Array, fn: Callable[[Array], float]) -> Array:
    """`fn` of every draw: [draws, ...] → [draws]."""
    return np.array([fn(row) for row in draws])


def spearman(x: Array, y: Array) -> Array:
    """Spearman's rank correlation of x [n] with each row of y [rows, n], ties at their mean rank: [rows].

    Pairs with NaN are left out; NaN where one side is constant.
    """
    valid = ~np.isnan(y)
    a, b = _centered_ranks(np.broadcast_to(x, y.shape), valid), _centered_ranks(y, valid)
    scale = np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
    return safe_divide((a * b).sum(axis=1), scale)


def _centered_ranks(values: Array, valid: NDArray[np.bool_]) -> Array:
    """In each row the ranks of what is known, less their mean; 0 for what is not."""
    left, right, mask = values[:, :, None], values[:, None], valid[:, None]
    ranks = ((left > right) & mask).sum(axis=2) + (((left == right) & mask).sum(axis=2) + 1) / 2
    num_valid = valid.sum(axis=1, keepdims=True)
    centered: Array = np.where(valid, ranks - (num_valid + 1) / 2, 0.0)
    return centered


def win_scores(ours: Array, theirs: Array) -> Array:
    """1 where mine is higher, ½ where both are equal, 0 where it is lower. −∞ stands for what is unknown."""
    outcome: Array = (ours > theirs) + 0.5 * (ours == theirs)
    return outcome
