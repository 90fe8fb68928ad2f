"""Percentiles and spread of measured values, and their format."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def percentile(values: Sequence[float], percent: float) -> float:
    """The percentile, with linear interpolation; NaN for no values."""
    if not values:
        return float("nan")
    ranked = sorted(values)
    position = (len(ranked) - 1) * percent / 100
    low = int(position)
    high = min(low + 1, len(ranked) - 1)
    return ranked[low] + (position - low) * (ranked[high] - ranked[low])


def median(values: Sequence[float]) -> float:
    """The median; NaN for no values."""
    return percentile(values, 50)


def summarize(values: Sequence[float], name: str) -> dict[str, float]:
    """mean_NAME, median_NAME, p90_NAME and p99_NAME, as in vLLM's benches."""
    return {
        f"mean_{name}": statistics.fmean(values) if values else float("nan"),
        f"median_{name}": median(values),
        f"p90_{name}": percentile(values, 90),
        f"p99_{name}": percentile(values, 99),
    }


def format_spread(values: Sequence[float]) -> str:
    """`12.3 (11 to 14.1)`: median, minimum, maximum."""
    if not values:
        return "none"
    return f"{format_number(median(values))} ({format_number(min(values))} to {format_number(max(values))})"


def format_number(value: float) -> str:
    """Three significant digits, or an integer from 1000 on."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def format_row(name: str, value_text: str) -> str:
    """One line of a text report."""
    return f"{name:<52} {value_text}"
