"""From scores to results: dials, fronts, win rates and costs, each with a bootstrap over questions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from . import caveats, pareto, ratings, statistics
from .result import PointResult, Result, RowResult
from .statistics import Estimate, each, estimate
from .table import Table, pooled

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ..study.row import Row
    from .pairwise import Judged
    from .statistics import Array

MEDIANS = ("perplexity",)
"""Measures whose mean a single answer can move anywhere."""


@dataclass(frozen=True)
class Analysis:
    """Makes the results of a table.

    marked: whether all aims are marked from 1 to 5. judged: what a judge said of pairs, if one was asked.
    """

    table: Table
    marked: bool
    judged: Judged

    def result(self) -> Result:
        """Everything, in the order of the study's rows; a family of several has one more, of all points."""
        rows: list[RowResult] = []
        for members in self._families():
            rows += [self._row(row) for row in members]
            rows += [self._together(members)] if len(members) > 1 else []
        points = tuple(point for members in self._families() for point in self._points(members))
        signs = np.array([aim.sign for aim in self.table.study.aims])
        ranges = tuple((float(worst), float(best)) for worst, best in (self.table.ranges * signs).T)
        return Result(tuple(rows), points, ranges, caveats.notes(self.table, points))

    def _families(self) -> list[list[Row]]:
        found: dict[str, list[Row]] = {}
        for row in self.table.study.rows:
            found.setdefault(row.family, []).append(row)
        return list(found.values())

    def _row(self, row: Row) -> RowResult:
        table = self.table
        drawn, asked = table.drawn(row), table.weights
        dials = [estimate(statistics.spearman(asked[:, k], drawn[:, k])) for k in range(asked.shape[1])]
        return RowResult(
            label=row.label,
            family=row.family,
            points=len(table.points(row)),
            steerability=tuple(dials),
            **self._fronts([row]),
            wins=self._wins([row]),
            judged={name: self._mean(won[..., None]) for name, won in self.judged.get(row.label, {}).items()},
            marks=self._marks([row]),
            measures=self._measures([row], slice(None)),
        )

    def _together(self, rows: Sequence[Row]) -> RowResult:
        """All points of a family. At each weight it is the row of it that is best there on the whole."""
        number = len({key for row in rows for key in self._keys(row)})
        return RowResult(
            label=f"{rows[0].family}, all wordings",
            family=rows[0].family,
            points=number,
            steerability=tuple(Estimate(None) for _ in self.table.study.aims),
            **self._fronts(rows),
            wins=self._wins(rows),
            judged={},
            marks=self._marks(rows),
            measures=self._measures(rows, slice(None)),
        )

    def _keys(self, row: Row) -> Iterator[tuple[str, ...]]:
        study = self.table.study
        for numbers in self.table.points(row):
            yield tuple(study.key(row, study.weights[numbers[0]], q) for q in study.questions)

    def _points(self, rows: Sequence[Row]) -> Iterator[PointResult]:
        table = self.table
        places = np.concatenate([table.places(row)[0] for row in rows])  # [points of the family, aims]
        best = iter(pareto.on_front(places))
        for row in rows:
            drawn = table.drawn(row)
            for numbers, place in zip(table.points(row), table.places(row)[0], strict=True):
                scores = (aim.sign * drawn[:, k, numbers[0]] for k, aim in enumerate(table.study.aims))
                yield PointResult(
                    label=row.label,
                    family=row.family,
                    weights=tuple(table.study.weights[number] for number in numbers),
                    scores=tuple(estimate(score) for score in scores),
                    normalised=tuple(None if np.isnan(x) else float(x) for x in place),
                    front=bool(next(best)),
                    measures=self._measures([row], slice(numbers[0], numbers[0] + 1)),
                )

    def _fronts(self, rows: Sequence[Row]) -> dict[str, Any]:
        volumes = self._volumes(rows)
        lead = {name: volumes - self._volumes(others) for name, others in self.table.references.items()}
        return {
            "hypervolume": estimate(volumes),
            "lead": {name: estimate(ahead) for name, ahead in lead.items()},
            "spread": estimate(each(self._places(rows), pareto.spread)),
        }

    def _volumes(self, rows: Sequence[Row]) -> Array:
        """The hypervolume of all points of these rows: [draws]."""
        return each(self._places(rows), pareto.hypervolume)

    def _places(self, rows: Sequence[Row]) -> Array:
        """Where all points of these rows are: [draws, points, aims]."""
        places = np.concatenate([self.table.places(row) for row in rows], axis=1)
        return places if places.shape[-1] <= 2 else places[: 1 + caveats.MANY_AIMS_DRAWS]

    def _wins(self, rows: Sequence[Row]) -> dict[str, Estimate]:
        """Of the rows, at each weight the best, against the best of each reference."""
        worth = self._worth(rows)
        won = {name: statistics.wins(worth, self._worth(r)) for name, r in self.table.references.items()}
        return {name: self._mean(values[..., None]) for name, values in won.items()}

    def _worth(self, rows: Sequence[Row]) -> Array:
        """Of that row which is best at each weight: [weights, questions]."""
        return np.stack([self.table.worth(row)[number] for number, row in enumerate(self.table.best(rows))])

    def _marks(self, rows: Sequence[Row]) -> dict[str, Estimate]:
        if not self.marked:
            return {}
        answers = np.concatenate([self.table.answers(row) for row in rows], axis=1)
        found = ratings.marks(answers)
        return {name: self._mean(values) for name, values in found.items()}

    def _measures(self, rows: Sequence[Row], weights: slice) -> dict[str, Estimate]:
        """Of the answers at these weights; each array is [weights, questions, n]."""
        scores, found = self.table.scores, {}
        for name, measure in {**scores.extras, **scores.facts}.items():
            values = np.concatenate([measure[row.label][weights] for row in rows])
            found[name] = self._median(values) if name in MEDIANS else self._mean(values)
        unscored = np.concatenate([np.isnan(self.table.answers(row)[:, weights]).any(axis=0) for row in rows])
        return {**found, "unscored": self._mean(unscored.astype(float))}

    def _mean(self, values: Array) -> Estimate:
        return estimate(statistics.means(pooled(values, axis=(0, 2)), self.table.counts))

    def _median(self, values: Array) -> Estimate:
        flat = np.swapaxes(values, 1, 2).reshape(-1, values.shape[1])  # [weights · n, questions]
        return estimate(statistics.medians(flat, self.table.counts))
