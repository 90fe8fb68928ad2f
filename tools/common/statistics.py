"""What is made of measured values: percentiles, and a median with its spread."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def percentile(values: Sequence[float], percent: float) -> float:
    """The value below which `percent` of them lie, linear between neighbours; NaN of none."""
    if not values:
        return float("nan")
    ranked = sorted(values)
    position = (len(ranked) - 1) * percent / 100
    low = int(position)
    high = min(low + 1, len(ranked) - 1)
    return ranked[low] + (position - low) * (ranked[high] - ranked[low])


def median(values: Sequence[float]) -> float:
    """NaN of none."""
    return percentile(values, 50)


def summarize(values: Sequence[float], name: str) -> dict[str, float]:
    """mean_NAME, median_NAME, p90_NAME and p99_NAME, as other benches call them."""
    return {
        f"mean_{name}": statistics.fmean(values) if values else float("nan"),
        f"median_{name}": median(values),
        f"p90_{name}": percentile(values, 90),
        f"p99_{name}": percentile(values, 99),
    }


def format_spread(values: Sequence[float]) -> str:
    """`12.3 (11.0 to 14.1)`: median, lowest, highest."""
    if not values:
        return "none"
    return f"{format_number(median(values))} ({format_number(min(values))} to {format_number(max(values))})"


def format_number(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def format_row(name: str, value_text: str) -> str:
    """One line for people."""
    return f"{name:<52} {value_text}"
