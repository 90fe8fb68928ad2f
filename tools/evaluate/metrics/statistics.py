"""Means with bootstrap intervals, rank correlation, win rates: what the report's numbers are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from collections.abc import Callable

Array = NDArray[np.float64]
DRAWS = 1000
COVERED = 95.0
"""Per cent of the draws that an interval covers."""


@dataclass(frozen=True)
class Estimate:
    """A value and its 95 % interval; None where there is none."""

    value: float | None
    low: float | None = None
    high: float | None = None


def resampled(questions: int, seed: int = 0) -> Array:
    """How often each question is in each draw of as many with replacement: [1 + DRAWS, questions].

    Row 0 is the questions as they are. One such array serves all methods, so that their draws are the same.
    """
    generator = np.random.default_rng(seed)
    picks = generator.integers(0, questions, (DRAWS, questions))
    counts = np.stack([np.bincount(pick, minlength=questions) for pick in picks])
    return np.concatenate([np.ones((1, questions)), counts])


def means(scores: Array, counts: Array) -> Array:
    """Means over questions in each draw. scores: [..., questions] with NaN where unknown → [draws, ...].

    NaN where a draw has no known score.
    """
    known = ~np.isnan(scores)
    total = np.tensordot(counts, np.where(known, scores, 0.0), axes=(1, -1))
    number = np.tensordot(counts, known.astype(float), axes=(1, -1))
    return quotient(total, number)


def quotient(total: Array, number: NDArray[Any]) -> Array:
    """total / number, NaN where the number is 0."""
    found = np.full(total.shape, np.nan)
    np.divide(total, number, out=found, where=number > 0)
    return found


def medians(scores: Array, counts: Array) -> Array:
    """The median of all scores in each draw. scores: [points, questions] with NaN where unknown → [draws].

    It is the lower of the middle two where there are two, as weighted medians are.
    """
    points, questions = scores.shape
    flat, which = scores.ravel(), np.tile(np.arange(questions), points)
    order = np.argsort(flat)[: int((~np.isnan(flat)).sum())]  # NaN sorts last
    if not len(order):
        return np.full(len(counts), np.nan)
    reached = np.cumsum(counts[:, which[order]], axis=1)
    middle = (reached >= reached[:, -1:] / 2).argmax(axis=1)
    found = flat[order][middle]
    return np.where(reached[:, -1] > 0, found, np.nan)


def estimate(drawn: Array) -> Estimate:
    """Value and interval from [1 + draws] values, the first of the data as they are."""
    if not len(drawn) or np.isnan(drawn[0]):
        return Estimate(None)
    known = drawn[1:][~np.isnan(drawn[1:])]
    if not len(known):
        return Estimate(float(drawn[0]))
    low, high = np.percentile(known, [50 - COVERED / 2, 50 + COVERED / 2])
    return Estimate(float(drawn[0]), float(low), float(high))


def each(drawn: Array, function: Callable[[Array], float]) -> Array:
    """`function` of every draw: [draws, ...] → [draws]."""
    return np.array([function(row) for row in drawn])


def spearman(x: Array, y: Array) -> Array:
    """Spearman's rank correlation of x [n] with each row of y [rows, n], ties at their mean rank: [rows].

    Pairs with NaN are left out; NaN where one side is constant.
    """
    known = ~np.isnan(y)
    a, b = _ranks(np.broadcast_to(x, y.shape), known), _ranks(y, known)
    scale = np.sqrt((a * a).sum(axis=1) * (b * b).sum(axis=1))
    return quotient((a * b).sum(axis=1), scale)


def _ranks(values: Array, known: NDArray[np.bool_]) -> Array:
    """In each row the ranks of what is known, less their mean; 0 for what is not."""
    one, other, counted = values[:, :, None], values[:, None], known[:, None]
    found = ((one > other) & counted).sum(axis=2) + (((one == other) & counted).sum(axis=2) + 1) / 2
    number = known.sum(axis=1, keepdims=True)
    centred: Array = np.where(known, found - (number + 1) / 2, 0.0)
    return centred


def wins(mine: Array, other: Array) -> Array:
    """1 where mine is higher, ½ where both are equal, 0 where it is lower. −∞ stands for what is unknown."""
    found: Array = (mine > other) + 0.5 * (mine == other)
    return found
