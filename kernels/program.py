"""Deprecated alias: `SteeringCoefficients` was called `Program` until 0.1; removed in 0.3."""

from __future__ import annotations

import warnings
from typing import Any

from .steering.coefficients import SteeringCoefficients

RENAMED = {
    "base": "base_coef",
    "scale": "objective_coef",
    "delay": "prev_contrast_coef",
    "reward": "reward_rate",
}
"""Old field names to new ones."""


def Program(**fields: Any) -> SteeringCoefficients:  # noqa: N802 - it was a class
    """Build `SteeringCoefficients` from old or new field names. Issues a FutureWarning."""
    warnings.warn(
        "trimtab.kernels.program.Program is trimtab.kernels.steering.coefficients.SteeringCoefficients since "
        "trimtab 0.2; the old name will be removed in 0.3",
        FutureWarning,
        stacklevel=2,
    )
    return SteeringCoefficients(**{RENAMED.get(name, name): value for name, value in fields.items()})
