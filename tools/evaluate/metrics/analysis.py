"""Compute a study's results from its scores: steerability, Pareto fronts, win rates and costs.

Each has an interval from a bootstrap over questions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from . import caveats, pareto, ratings, statistics
from .result import PointResult, Result, RowResult
from .statistics import Estimate, estimate, map_draws
from .table import ScoreTable, nan_mean

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ..study.row import Row
    from .pairwise import Judgments
    from .statistics import Array

MEDIAN_MEASURES = ("perplexity",)
"""Measures reported as a median, because one outlier can dominate the mean."""


@dataclass(frozen=True)
class Analysis:
    """Computes the results of a score table.

    has_ratings: whether all objectives are rated from 1 to 5. judgments: the pairwise judgments, empty
    without a judge.
    """

    table: ScoreTable
    has_ratings: bool
    judgments: Judgments

    def compute(self) -> Result:
        """All results, in the order of the study's rows. A family of several rows adds one for its points."""
        row_results: list[RowResult] = []
        for members in self._group_by_family():
            row_results += [self._row_result(row) for row in members]
            row_results += [self._family_result(members)] if len(members) > 1 else []
        points = tuple(point for members in self._group_by_family() for point in self._point_results(members))
        signs = np.array([target.sign for target in self.table.study.targets])
        ranges = tuple((float(worst), float(best)) for worst, best in (self.table.ranges * signs).T)
        return Result(tuple(row_results), points, ranges, caveats.find_caveats(self.table, points))

    def _group_by_family(self) -> list[list[Row]]:
        families: dict[str, list[Row]] = {}
        for row in self.table.study.rows:
            families.setdefault(row.family, []).append(row)
        return list(families.values())

    def _row_result(self, row: Row) -> RowResult:
        table = self.table
        mean_scores, weights = table.mean_scores(row), table.weights
        correlations = [
            estimate(statistics.spearman(weights[:, k], mean_scores[:, k])) for k in range(weights.shape[1])
        ]
        return RowResult(
            label=row.label,
            family=row.family,
            points=len(table.distinct_points(row)),
            steerability=tuple(correlations),
            **self._front_estimates([row]),
            wins=self._win_rates([row]),
            judged={
                name: self._mean_estimate(outcomes[..., None])
                for name, outcomes in self.judgments.get(row.label, {}).items()
            },
            marks=self._rating_estimates([row]),
            measures=self._measure_estimates([row], slice(None)),
        )

    def _family_result(self, rows: Sequence[Row]) -> RowResult:
        """The result for all points of a family, whose best row by mean utility is used at each weight."""
        num_points = len({key for row in rows for key in self._answer_keys(row)})
        return RowResult(
            label=f"{rows[0].family}, all wordings",
            family=rows[0].family,
            points=num_points,
            steerability=tuple(Estimate(None) for _ in self.table.study.targets),
            **self._front_estimates(rows),
            wins=self._win_rates(rows),
            judged={},
            marks=self._rating_estimates(rows),
            measures=self._measure_estimates(rows, slice(None)),
        )

    def _answer_keys(self, row: Row) -> Iterator[tuple[str, ...]]:
        study = self.table.study
        for weight_indices in self.table.distinct_points(row):
            yield tuple(study.answer_key(row, study.weights[weight_indices[0]], q) for q in study.questions)

    def _point_results(self, rows: Sequence[Row]) -> Iterator[PointResult]:
        table = self.table
        coords = np.concatenate([table.point_coords(row)[0] for row in rows])  # [points, objectives]
        on_front = iter(pareto.is_pareto_optimal(coords))
        for row in rows:
            mean_scores = table.mean_scores(row)
            for weight_indices, coord in zip(
                table.distinct_points(row), table.point_coords(row)[0], strict=True
            ):
                scores = (
                    target.sign * mean_scores[:, k, weight_indices[0]]
                    for k, target in enumerate(table.study.targets)
                )
                yield PointResult(
                    label=row.label,
                    family=row.family,
                    weights=tuple(table.study.weights[index] for index in weight_indices),
                    scores=tuple(estimate(score) for score in scores),
                    normalised=tuple(None if np.isnan(x) else float(x) for x in coord),
                    front=bool(next(on_front)),
                    measures=self._measure_estimates([row], slice(weight_indices[0], weight_indices[0] + 1)),
                )

    def _front_estimates(self, rows: Sequence[Row]) -> dict[str, Any]:
        volumes = self._hypervolumes(rows)
        lead = {
            name: volumes - self._hypervolumes(reference_rows)
            for name, reference_rows in self.table.reference_rows.items()
        }
        return {
            "hypervolume": estimate(volumes),
            "lead": {name: estimate(difference) for name, difference in lead.items()},
            "spread": estimate(map_draws(self._coords(rows), pareto.spread)),
        }

    def _hypervolumes(self, rows: Sequence[Row]) -> Array:
        """The hypervolume of all points of these rows in each draw: [draws]."""
        return map_draws(self._coords(rows), pareto.hypervolume)

    def _coords(self, rows: Sequence[Row]) -> Array:
        """Normalised coordinates of all points of these rows: [draws, points, objectives]."""
        coords = np.concatenate([self.table.point_coords(row) for row in rows], axis=1)
        return coords if coords.shape[-1] <= 2 else coords[: 1 + caveats.MULTI_TARGET_DRAWS]

    def _win_rates(self, rows: Sequence[Row]) -> dict[str, Estimate]:
        """Win rates of the best row at each weight against the best row of each reference."""
        utility = self._best_utility(rows)
        outcomes = {
            name: statistics.win_scores(utility, self._best_utility(r))
            for name, r in self.table.reference_rows.items()
        }
        return {name: self._mean_estimate(values[..., None]) for name, values in outcomes.items()}

    def _best_utility(self, rows: Sequence[Row]) -> Array:
        """The utility of the best row at each weight: [weights, questions]."""
        return np.stack(
            [self.table.utility(row)[index] for index, row in enumerate(self.table.best_rows(rows))]
        )

    def _rating_estimates(self, rows: Sequence[Row]) -> dict[str, Estimate]:
        if not self.has_ratings:
            return {}
        scores = np.concatenate([self.table.answer_scores(row) for row in rows], axis=1)
        metrics = ratings.rating_metrics(scores)
        return {name: self._mean_estimate(values) for name, values in metrics.items()}

    def _measure_estimates(self, rows: Sequence[Row], weights: slice) -> dict[str, Estimate]:
        """Estimate the measures of the answers at these weights, from arrays [weights, questions, n]."""
        scores, estimates = self.table.scores, {}
        for name, measure in {**scores.extras, **scores.facts}.items():
            values = np.concatenate([measure[row.label][weights] for row in rows])
            estimates[name] = (
                self._median_estimate(values) if name in MEDIAN_MEASURES else self._mean_estimate(values)
            )
        missing = np.concatenate(
            [np.isnan(self.table.answer_scores(row)[:, weights]).any(axis=0) for row in rows]
        )
        return {**estimates, "unscored": self._mean_estimate(missing.astype(float))}

    def _mean_estimate(self, values: Array) -> Estimate:
        return estimate(statistics.bootstrap_means(nan_mean(values, axis=(0, 2)), self.table.counts))

    def _median_estimate(self, values: Array) -> Estimate:
        flat = np.swapaxes(values, 1, 2).reshape(-1, values.shape[1])  # [weights · n, questions]
        return estimate(statistics.bootstrap_medians(flat, self.table.counts))
