"""What is said of answers that are marked from 1 to 5 for each preference: AMR, APS and Worst."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .statistics import Array

RATING_SCALE = (1.0, 5.0)
MIN_MET_RATING = 3.0
"""The mark from which on a preference is met."""


def rating_metrics(ratings: Array) -> dict[str, Array]:
    """By name, of marks [preferences, ...]: AMR, whether all are met; APS, their mean; Worst, the lowest.

    Each is [...], NaN where a mark is unknown.
    """
    missing = np.isnan(ratings).any(axis=0)
    return {
        "AMR": np.where(missing, np.nan, (ratings >= MIN_MET_RATING).all(axis=0)),
        "APS": ratings.mean(axis=0),
        "Worst": ratings.min(axis=0),
    }
