"""Pareto front, hypervolume and spread of points; in every coordinate higher is better."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .statistics import Array


def is_pareto_optimal(points: Array) -> NDArray[np.bool_]:
    """Which of the points [points, objectives] no other dominates: at least as good in all, better in one.

    A point with NaN is not on the front and dominates none.
    """
    valid = ~np.isnan(points).any(axis=1)
    left, right = points[:, None], points[None]
    dominates: NDArray[np.bool_] = np.all(left >= right, axis=-1) & np.any(left > right, axis=-1)
    dominated: NDArray[np.bool_] = np.any(dominates[valid], axis=0)
    return valid & ~dominated


def hypervolume(points: Array) -> float:
    """The volume that the points dominate above the origin (Zitzler and Thiele, 1998).

    points: [points, objectives]; a point with a negative coordinate adds nothing. Exact, by slicing along
    one objective after another. NaN if every point has a NaN.
    """
    valid = points[~np.isnan(points).any(axis=1)]
    if not len(valid):
        return float("nan")
    positive = valid[(valid > 0).all(axis=1)]
    return _slice_volume(positive) if len(positive) else 0.0


def spread(points: Array) -> float:
    """The extent of the front: highest minus lowest coordinate, the mean over objectives."""
    front = points[is_pareto_optimal(points)]
    return float((front.max(axis=0) - front.min(axis=0)).mean()) if len(front) else float("nan")


def _slice_volume(points: Array) -> float:
    """Sum slices along the last objective from the highest point down; a slice ends at the next point."""
    if points.shape[1] == 1:
        return float(points.max())
    if points.shape[1] == 2:
        return _area_2d(points)
    front = points[is_pareto_optimal(points)]
    descending = front[np.argsort(-front[:, -1], kind="stable")]
    depths = descending[:, -1] - np.append(descending[1:, -1], 0.0)
    slices = (descending[: end + 1, :-1] for end in range(len(descending)))
    return float(sum(d * _slice_volume(s) for d, s in zip(depths, slices, strict=True) if d > 0))


def _area_2d(points: Array) -> float:
    """Sum strips along the first objective, from its highest point down."""
    descending = points[np.argsort(-points[:, 0], kind="stable")]
    heights = np.maximum.accumulate(descending[:, 1])
    return float((descending[:, 0] - np.append(descending[1:, 0], 0.0)) @ heights)
