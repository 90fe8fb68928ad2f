"""Trim, the default method: every objective gets the share that was asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...kernels.steering.coefficients import SteeringCoefficients
from ..utils.fields import config_field
from .base import MAX_STRENGTH, RELATIVE_TOP, Method, contrast_coefficients


@dataclass(frozen=True, kw_only=True)
class Trim(Method):
    """z_0 + Σ g_k (z_k − z_0) with gains that are re-optimised toward the share that was asked.

    An objective's weight is its intensity: 0 leaves it out, 1 asks for the whole effect of its prompt, and a
    weight above 1 for more. See `kernels.steering.gains` and docs/trim.md for the optimisation.
    """

    normalises_weights: ClassVar[bool] = False

    gain: float = config_field(2.0, "gain of an objective of weight 1 at the start of the answer")
    control_rate: float = config_field(
        0.15, "gain per nat that an objective is behind what was asked; 0 is off"
    )
    max_gain: float = config_field(4.0, "largest gain of an objective")
    relative_top: float | None = config_field(0.1, RELATIVE_TOP)

    def coefficients(self) -> SteeringCoefficients:
        self.require_positive("gain", "max_gain")
        self.require("control_rate", 0 <= self.control_rate <= 1000, "from 0 to 1000")
        self.require("max_gain", self.max_gain <= MAX_STRENGTH, f"at most {MAX_STRENGTH:g}")
        return contrast_coefficients(self, self.gain, max_gain=self.max_gain, control_rate=self.control_rate)
