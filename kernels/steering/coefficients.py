"""A decoding method as a row of coefficients, the input of the steering step.

Every prompt-contrast decoder is, per token,

    s(v) ≃ base · z_0(v) + scale · Σ_k w_k z_k(v) + g · [z_1(v) − z_0(v)] of the previous step

over the branch logits z. The coefficients select the method: base is base_coef, scale objective_coef and g
prev_contrast_coef.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

SUM, MEAN, EMA = 0, 1, 2
"""How rewards accumulate over the generated tokens: values of `SteeringCoefficients.accumulate`."""


@dataclass(frozen=True)
class SteeringCoefficients:
    """One request's coefficients. The default is plain decoding of branch 0.

    base_coef, objective_coef: coefficients of the base branch and of the weighted objective branches.
    prev_contrast_coef: OPAD's g: adds the previous step's contrast; the first step takes the objective
                        branches alone. 0 is off.
    mask_top_p:         only tokens in this nucleus of softmax(z_1 / mask_temperature) are allowed. 1 is off.
    reward_rate:        β/τ of MATO's weights w_k ∝ w⁰_k exp(−(β/τ) R_k), R_k from l_k − l_0. 0 is off.
    beta:               β alone, for the reported rewards.
    accumulate:         SUM, MEAN or EMA of the rewards so far; `decay` is the EMA's decay.
    kl_budget:          ε of the trust region, nats per token: KL(π_a ‖ π_m) ≤ ε. Infinity is off.
    """

    base_coef: float = 1.0
    objective_coef: float = 0.0
    prev_contrast_coef: float = 0.0
    mask_top_p: float = 1.0
    mask_temperature: float = 1.0
    reward_rate: float = 0.0
    beta: float = 1.0
    accumulate: int = SUM
    decay: float = 0.9
    kl_budget: float = math.inf

    @property
    def needs_base(self) -> bool:
        """Whether the scores depend on branch 0, directly or through rewards or the KL budget."""
        return bool(
            self.base_coef or self.prev_contrast_coef or self.reward_rate or self.kl_budget < math.inf
        )
