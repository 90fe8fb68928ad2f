"""The grid of weights on the simplex."""

from __future__ import annotations

from fractions import Fraction
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

Weights = tuple[float, ...]


def simplex_grid(num_objectives: int, num_points: int) -> list[Weights]:
    """All weight vectors of `num_objectives` that are multiples of 1/(num_points - 1) and sum to 1.

    For two objectives these are `num_points` vectors, the first weight falling from 1 to 0. One point is
    the centre, with equal weights. A single objective has the intensities from 1 to 0.
    """
    if num_points == 1:
        return [(1 / num_objectives,) * num_objectives]
    num_steps = num_points - 1
    if num_objectives == 1:
        return [(count / num_steps,) for count in range(num_steps, -1, -1)]
    return [
        tuple(count / num_steps for count in counts)
        for counts in _iter_compositions(num_steps, num_objectives)
    ]


def format_weights(weights: Weights) -> str:
    """Format weights for tables: `1/6 : 5/6`."""
    return " : ".join(str(Fraction(weight).limit_denominator(1000)) for weight in weights)


def _iter_compositions(total: int, num_parts: int) -> Iterator[tuple[int, ...]]:
    if num_parts == 1:
        yield (total,)
        return
    for first in range(total, -1, -1):
        for rest in _iter_compositions(total - first, num_parts - 1):
            yield (first, *rest)
