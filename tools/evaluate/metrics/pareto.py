"""The Pareto front of points of which every coordinate is better when higher: who is on it, its hypervolume,
how wide it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from .statistics import Array


def is_pareto_optimal(points: Array) -> NDArray[np.bool_]:
    """Which of [points, objectives] no other point beats: at least as good in all, better in one.

    A point with NaN is not on it, and beats none.
    """
    valid = ~np.isnan(points).any(axis=1)
    left, right = points[:, None], points[None]
    dominates: NDArray[np.bool_] = np.all(left >= right, axis=-1) & np.any(left > right, axis=-1)
    dominated: NDArray[np.bool_] = np.any(dominates[valid], axis=0)
    return valid & ~dominated


def hypervolume(points: Array) -> float:
    """The volume between the origin and the points' front: of all that some point is at least as good as.

    points: [points, objectives]; what is below 0 anywhere adds nothing. Exact: sliced along one objective
    after another (Zitzler and Thiele, 1998, for the measure). NaN without points that are known.
    """
    valid = points[~np.isnan(points).any(axis=1)]
    if not len(valid):
        return float("nan")
    positive = valid[(valid > 0).all(axis=1)]
    return _slice_volume(positive) if len(positive) else 0.0


def spread(points: Array) -> float:
    """How much of the range the front covers: highest minus lowest, the mean over objectives."""
    front = points[is_pareto_optimal(points)]
    return float((front.max(axis=0) - front.min(axis=0)).mean()) if len(front) else float("nan")


def _slice_volume(points: Array) -> float:
    """Slices along the last objective, from the highest point down: each as deep as the drop to the next."""
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
    """Strips of the first objective, from the point that is best in it."""
    descending = points[np.argsort(-points[:, 0], kind="stable")]
    heights = np.maximum.accumulate(descending[:, 1])
    return float((descending[:, 0] - np.append(descending[1:, 0], 0.0)) @ heights)
