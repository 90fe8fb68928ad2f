"""A decoding method as a row of coefficients, the input of the steering step.

Every prompt-contrast decoder is, per token,

    s(v) ≃ base_coef · z_0(v) + objective_coef · Σ_k w_k z_k(v)

over the branch logits z, with the features whose columns are inherited below; a method is a row of scalars.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from .gains import GainColumns
from .masks import MaskColumns
from .prev_contrast import PrevContrastColumns
from .rewards import RewardColumns


@dataclass(frozen=True)
class MixColumns:
    """Coefficients of the base branch and of the weighted objective branches."""

    base_coef: float = 1.0
    objective_coef: float = 0.0


@dataclass(frozen=True)
class TrustRegionColumns:
    """kl_budget: ε of the trust region, nats per token: KL(π_a ‖ π_m) ≤ ε. Infinity is off."""

    kl_budget: float = math.inf


@dataclass(frozen=True)
class SteeringCoefficients(
    TrustRegionColumns, RewardColumns, GainColumns, MaskColumns, PrevContrastColumns, MixColumns
):
    """One request's coefficients: plain decoding of branch 0, unless they say otherwise."""

    @property
    def needs_base(self) -> bool:
        """Whether the scores depend on branch 0, directly or through rewards or the KL budget."""
        return bool(
            self.base_coef
            or self.prev_contrast_coef
            or self.reward_rate
            or self.max_gain
            or self.kl_budget < math.inf
        )
