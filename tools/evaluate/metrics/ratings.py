"""Metrics of answers rated from 1 to 5 for each objective: AMR, APS and Worst."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .statistics import Array

RATING_SCALE = (1.0, 5.0)
MIN_MET_RATING = 3.0
"""An objective with at least this rating is met."""


def rating_metrics(ratings: Array) -> dict[str, Array]:
    """AMR, whether all are met; APS, their mean; Worst, the lowest, of ratings [objectives, ...].

    Each is [...], NaN where a rating is missing.
    """
    missing = np.isnan(ratings).any(axis=0)
    return {
        "AMR": np.where(missing, np.nan, (ratings >= MIN_MET_RATING).all(axis=0)),
        "APS": ratings.mean(axis=0),
        "Worst": ratings.min(axis=0),
    }
