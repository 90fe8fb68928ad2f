"""Bootstrap means, medians and intervals, rank correlation, win scores."""

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
"""Per cent of the draws within an interval."""


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval; None where undefined."""

    value: float | None
    low: float | None = None
    high: float | None = None


def bootstrap_counts(num_questions: int, seed: int = 0) -> Array:
    """How often each question occurs in each bootstrap draw: [1 + NUM_DRAWS, questions].

    Row 0 is all ones, the data itself. All methods use one such array, so their draws are paired.
    """
    rng = np.random.default_rng(seed)
    indices = rng.integers(0, num_questions, (NUM_DRAWS, num_questions))
    counts = np.stack([np.bincount(row, minlength=num_questions) for row in indices])
    return np.concatenate([np.ones((1, num_questions)), counts])


def bootstrap_means(scores: Array, counts: Array) -> Array:
    """Means over questions in each draw. scores: [..., questions], NaN where missing → [draws, ...].

    NaN where a draw has no score.
    """
    valid = ~np.isnan(scores)
    total = np.tensordot(counts, np.where(valid, scores, 0.0), axes=(1, -1))
    count = np.tensordot(counts, valid.astype(float), axes=(1, -1))
    return safe_divide(total, count)


def safe_divide(numerator: Array, denominator: NDArray[Any]) -> Array:
    """numerator / denominator, NaN where the denominator is 0."""
    result = np.full(numerator.shape, np.nan)
    np.divide(numerator, denominator, out=result, where=denominator > 0)
    return result


def bootstrap_medians(scores: Array, counts: Array) -> Array:
    """The median of all scores in each draw. scores: [points, questions], NaN where missing → [draws].

    For an even count it is the lower of the middle two, as in a weighted median.
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
    """Value and interval from [1 + draws] values; the first is that of the data itself."""
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

    Pairs with NaN in y are ignored; NaN where one side is constant.
    """
    from scipy.stats import rankdata  # noqa: PLC0415 - an optional package

    x_ranks, y_ranks = (
        rankdata(values, axis=1, nan_policy="omit") for values in (np.where(np.isnan(y), np.nan, x), y)
    )
    middle = (1 + (~np.isnan(y)).sum(axis=1, keepdims=True)) / 2
    a, b = np.nan_to_num(x_ranks - middle), np.nan_to_num(y_ranks - middle)
    return safe_divide((a * b).sum(axis=1), np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1)))


def win_scores(ours: Array, theirs: Array) -> Array:
    """1 where `ours` is higher, ½ where equal, 0 where lower. −∞ stands for a missing value."""
    outcome: Array = (ours > theirs) + 0.5 * (ours == theirs)
    return outcome
