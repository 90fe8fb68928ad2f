"""Pareto front and hypervolume against brute-force counting."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trimtab.tools.evaluate.metrics import pareto

TOP = 4


def point_clouds(max_points: int = 6) -> st.SearchStrategy[np.ndarray]:
    """Points with integer coordinates, some below 0, for 1 to 4 objectives."""
    return st.integers(1, 4).flatmap(
        lambda k: st.lists(st.tuples(*[st.integers(-1, TOP)] * k), min_size=1, max_size=max_points).map(
            lambda points: np.array(points, dtype=float)
        )
    )


@given(point_clouds())
@settings(max_examples=200)
def test_the_hypervolume_of_integer_points_is_the_number_of_dominated_cells(
    points: np.ndarray,
) -> None:
    cells = itertools.product(range(TOP), repeat=points.shape[1])
    covered = sum(
        any(all(c + 1 <= x for c, x in zip(cell, p, strict=True)) for p in points) for cell in cells
    )
    assert pareto.hypervolume(points) == pytest.approx(covered)


@given(point_clouds())
def test_the_pareto_front_contains_exactly_the_undominated_points(points: np.ndarray) -> None:
    on_front = pareto.is_pareto_optimal(points)
    for index, point in enumerate(points):
        dominated = any((other >= point).all() and (other > point).any() for other in points)
        assert on_front[index] == (not dominated)


def test_hypervolume_and_spread_match_a_hand_computed_example() -> None:
    points = np.array([[1.0, 0.25], [0.5, 0.75], [0.25, 0.5]])
    assert pareto.hypervolume(points) == pytest.approx(0.25 + 0.25)
    assert pareto.spread(points) == pytest.approx(0.5)
    assert pareto.spread(points[:1]) == 0


def test_points_with_missing_scores_are_ignored() -> None:
    points = np.array([[0.5, 0.5], [math.nan, 9.0]])
    assert pareto.is_pareto_optimal(points).tolist() == [True, False]
    assert pareto.hypervolume(points) == pytest.approx(0.25)
    assert math.isnan(pareto.hypervolume(points[1:]))
    assert math.isnan(pareto.spread(points[1:]))
