"""Statistics of the benches."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from trimtab.tools.common import statistics as figures

VALUES = st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30)


@given(values=VALUES, percent=st.floats(0, 100))
def test_percentile_matches_numpy(values: list[float], percent: float) -> None:
    assert figures.percentile(values, percent) == pytest.approx(np.percentile(values, percent), abs=1e-6)


def test_summary_names_match_vllm() -> None:
    values = [float(value) for value in range(1, 102)]
    summary = figures.summarize(values, "ttft_ms")
    assert summary == {"mean_ttft_ms": 51, "median_ttft_ms": 51, "p90_ttft_ms": 91, "p99_ttft_ms": 100}
    assert summary["mean_ttft_ms"] == statistics.fmean(values)


def test_no_values_give_nan() -> None:
    assert all(math.isnan(value) for value in figures.summarize([], "x").values())
    assert figures.format_spread([]) == "none"


def test_a_spread_has_median_minimum_and_maximum() -> None:
    assert figures.format_spread([3.0, 1234.56, 2.005]) == "3 (2 to 1235)"
