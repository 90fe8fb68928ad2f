"""What a study found: a result for each row and each point, every number with its interval."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..study.grid import Weights
    from .statistics import Estimate


@dataclass(frozen=True)
class PointResult:
    """A row at one weight, or at all weights for which it gives the same answers.

    scores:     mean score of each aim as its scorer gives it.
    normalised: the same with 0 and 1 at the worst and the best mean of all points, higher is better.
    front:      whether no other point of its row's family is at least as good in all aims and better in one.
    measures:   means of the further scorers (perplexity: the median) and of words, tokens, logprob, kl,
                strength and truncated; `unscored` is the share of answers without a score by some aim.
    """

    label: str
    family: str
    weights: tuple[Weights, ...]
    scores: tuple[Estimate, ...]
    normalised: tuple[float | None, ...]
    front: bool
    measures: dict[str, Estimate]


@dataclass(frozen=True)
class RowResult:
    """A method over all its weights.

    steerability: for each aim, Spearman's correlation of asked weight and mean score; no value without a dial
                  that moves.
    hypervolume, spread: of its front, normalised.
    lead:         by reference, its hypervolume less that of all the reference's points, in the same draws.
    wins:         by reference, the share of (question, weight) at which the weighted mean of normalised
                  scores is higher than the reference's at that weight.
    judged:       the same as a judge of pairs says; empty where none was asked.
    marks:        AMR, APS and Worst, where all aims are marked from 1 to 5.
    measures:     as of a point, over all asked weights.
    """

    label: str
    family: str
    points: int
    steerability: tuple[Estimate, ...]
    hypervolume: Estimate
    lead: dict[str, Estimate]
    spread: Estimate
    wins: dict[str, Estimate]
    judged: dict[str, Estimate]
    marks: dict[str, Estimate]
    measures: dict[str, Estimate]


@dataclass(frozen=True)
class Result:
    """All rows and points, and what a reader must know to read them.

    ranges: of each aim, the worst and the best mean of all points, as its scorer gives them.
    """

    rows: tuple[RowResult, ...]
    points: tuple[PointResult, ...]
    ranges: tuple[tuple[float, float], ...]
    notes: tuple[str, ...]
