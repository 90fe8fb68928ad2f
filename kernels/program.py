"""The name that `SteeringCoefficients` had until 0.1, kept for one release."""

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
"""Fields by their old names."""


def Program(**fields: Any) -> SteeringCoefficients:  # noqa: N802 - it was a class
    """The coefficients of these fields, under their old names or their new ones. Warns."""
    warnings.warn(
        "trimtab.kernels.program.Program is trimtab.kernels.steering.coefficients.SteeringCoefficients since "
        "trimtab 0.2; the old name ends with 0.3",
        FutureWarning,
        stacklevel=2,
    )
    return SteeringCoefficients(**{RENAMED.get(name, name): value for name, value in fields.items()})
