"""Bootstrap means, medians, intervals, rank correlation and wins against naive implementations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.stats  # noqa: F401 - spearman's import is not in a measured example
from hypothesis import given, settings
from hypothesis import strategies as st
from trimtab.tools.evaluate.metrics import statistics

SCORES = st.lists(st.sampled_from([0.0, 1.0, 2.5, -3.0, math.nan]), min_size=1, max_size=8)
PAIRS = st.lists(st.tuples(st.integers(0, 4), st.integers(-2, 2)), min_size=2, max_size=9)


def test_a_bootstrap_sample_draws_with_replacement_and_the_first_is_the_data() -> None:
    counts = statistics.bootstrap_counts(9, seed=3)
    assert counts.shape == (1 + statistics.NUM_DRAWS, 9)
    assert (counts[0] == 1).all()
    assert (counts.sum(axis=1) == 9).all()
    assert (counts[1:] == 0).any(axis=1).mean() > 0.9
    assert abs(counts[1:].mean() - 1) < 1e-9
    assert (counts == statistics.bootstrap_counts(9, seed=3)).all()
    assert (counts != statistics.bootstrap_counts(9, seed=4)).any()


@given(SCORES, st.integers(0, 9))
def test_a_bootstrap_mean_weights_questions_by_their_draws(scores: list[float], seed: int) -> None:
    counts = statistics.bootstrap_counts(len(scores), seed=seed)[:6]
    means = statistics.bootstrap_means(np.array(scores), counts)
    for drawn, mean in zip(counts, means, strict=True):
        pool = [s for s, count in zip(scores, drawn, strict=True) for _ in range(int(count))]
        valid = [s for s in pool if not math.isnan(s)]
        assert mean == pytest.approx(sum(valid) / len(valid) if valid else math.nan, nan_ok=True)


@given(st.integers(1, 3), SCORES, st.integers(0, 9))
def test_a_bootstrap_median_is_the_lower_middle_draw(points: int, scores: list[float], seed: int) -> None:
    table = np.array([[score + point for score in scores] for point in range(points)])
    counts = statistics.bootstrap_counts(len(scores), seed=seed)[:6]
    for drawn, median in zip(counts, statistics.bootstrap_medians(table, counts), strict=True):
        pool = sorted(
            value
            for line in table.tolist()
            for value, count in zip(line, drawn, strict=True)
            for _ in range(int(count))
            if not math.isnan(value)
        )
        assert median == pytest.approx(pool[(len(pool) - 1) // 2] if pool else math.nan, nan_ok=True)


def test_a_bootstrap_interval_has_about_its_nominal_coverage() -> None:
    generator, covered = np.random.default_rng(0), 0
    counts = statistics.bootstrap_counts(40)[:301]
    for _ in range(200):
        estimate = statistics.estimate(statistics.bootstrap_means(generator.normal(2.0, 1.0, 40), counts))
        assert estimate.low is not None
        assert estimate.high is not None
        covered += estimate.low <= 2.0 <= estimate.high
    assert 0.88 <= covered / 200 <= 0.99


def test_an_estimate_of_nan_has_no_value_and_one_without_draws_no_interval() -> None:
    assert statistics.estimate(np.array([math.nan, 1.0])) == statistics.Estimate(None)
    assert statistics.estimate(np.array([1.0, math.nan])) == statistics.Estimate(1.0)


@given(PAIRS)
@settings(max_examples=200)
def test_spearman_is_the_correlation_of_average_ranks(pairs: list[tuple[int, int]]) -> None:
    x, y = (np.array(side, dtype=float) for side in zip(*pairs, strict=True))

    def slow_ranks(values: np.ndarray) -> np.ndarray:
        return np.array([(values < v).sum() + ((values == v).sum() + 1) / 2 for v in values])

    a, b = slow_ranks(x), slow_ranks(y)
    constant = len(set(x)) == 1 or len(set(y)) == 1
    expected = math.nan if constant else float(np.corrcoef(a, b)[0, 1])
    assert statistics.spearman(x, y[None])[0] == pytest.approx(expected, nan_ok=True)


def test_spearman_without_ties_matches_the_textbook_formula_and_ignores_nan() -> None:
    x = np.array([1.0, 2, 3, 4, 5])
    y = np.array([[2.0, 1, 4, 3, 5], [1, math.nan, 2, 3, 4], [4, 3, 2, math.nan, 1], [math.nan] * 5])
    expected = [1 - 6 * 4 / (5 * 24), 1, -1, math.nan]
    assert statistics.spearman(x, y).tolist() == pytest.approx(expected, nan_ok=True)


def test_a_win_scores_one_a_tie_half_and_a_missing_value_loses() -> None:
    low = -math.inf
    mine, other = np.array([2.0, 1, 0, low, low, 0]), np.array([1.0, 1, 1, 0, low, low])
    assert statistics.win_scores(mine, other).tolist() == [1, 0.5, 0, 0, 0.5, 1]
