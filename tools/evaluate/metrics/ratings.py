"""What is said of answers that are marked from 1 to 5 for each preference: AMR, APS and Worst."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .statistics import Array

SCALE = (1.0, 5.0)
MET = 3.0
"""The mark from which on a preference is met."""


def marks(answers: Array) -> dict[str, Array]:
    """By name, of marks [preferences, ...]: AMR, whether all are met; APS, their mean; Worst, the lowest.

    Each is [...], NaN where a mark is unknown.
    """
    unknown = np.isnan(answers).any(axis=0)
    return {
        "AMR": np.where(unknown, np.nan, (answers >= MET).all(axis=0)),
        "APS": answers.mean(axis=0),
        "Worst": answers.min(axis=0),
    }
