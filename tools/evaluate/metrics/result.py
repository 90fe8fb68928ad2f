"""Results of a study, for each row and each point; every number has its interval."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..study.grid import Weights
    from .statistics import Estimate


@dataclass(frozen=True)
class PointResult:
    """A row at one weight, or at all weights for which it gives the same answers.

    scores:     mean score of each objective, in its scorer's units.
    normalised: the same, scaled to 0 at the worst mean of all points and 1 at the best; higher is better.
    front:      whether it is on the Pareto front of its row's family.
    measures:   means of the extra scorers (perplexity: the median) and of words, tokens, logprob, kl,
                strength and truncated; `unscored` is the share of answers not scored for some objective.
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

    steerability: for each objective, Spearman's correlation of requested weight and mean score; no value
                  if either is constant.
    hypervolume, spread: of its front, in normalised scores.
    lead:         by reference, its hypervolume minus that of all the reference's points, in the same draws.
    wins:         by reference, the share of (question, weight) at which the weighted mean of normalised
                  scores is higher than the reference's at that weight.
    judged:       the same by a pairwise judge's verdicts; empty without a judge.
    marks:        AMR, APS and Worst, if all objectives are rated from 1 to 5.
    measures:     as for a point, over all requested weights.
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
    """All rows and points.

    ranges: the worst and the best mean of all points, for each objective in its scorer's units.
    notes: warnings about the numbers.
    """

    rows: tuple[RowResult, ...]
    points: tuple[PointResult, ...]
    ranges: tuple[tuple[float, float], ...]
    notes: tuple[str, ...]
