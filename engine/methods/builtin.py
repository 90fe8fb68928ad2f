"""The published decoding methods: their hyperparameters and steering coefficients.

Defaults are the published values. `METHODS` lists these and `Trim`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from ...kernels.common.errors import InputError
from ...kernels.steering.closed_form import reward_strength, strength
from ...kernels.steering.coefficients import SteeringCoefficients
from ...kernels.steering.rewards import EMA, MEAN, SUM
from ..utils.fields import config_field
from .base import Method, contrast_coefficients
from .trim import Trim

KL_BUDGET = "trust region: at most this many nats per token from the merged policy; none is off"


@dataclass(frozen=True)
class Base(Method):
    """Plain decoding of the prompt without objectives."""

    objective_arity = "none"

    def coefficients(self) -> SteeringCoefficients:
        return SteeringCoefficients()


@dataclass(frozen=True)
class Prompt(Method):
    """Prompting: plain decoding of the prompt that lists the objectives."""

    objective_arity = "one"

    def coefficients(self) -> SteeringCoefficients:
        return SteeringCoefficients(base_coef=0.0, objective_coef=1.0)


@dataclass(frozen=True, kw_only=True)
class LinearAlignment(Method):
    """Linear Alignment (Gao et al., ICML 2024): (1 + r) z_1 − r z_0 in a nucleus of z_1."""

    objective_arity = "one"

    ratio: float = config_field(2.0, "r of (1 + r) z_1 - r z_0")
    mask_top_p: float | None = config_field(
        0.8, "allow only this nucleus of the objective branch; none allows all"
    )
    mask_temperature: float = config_field(1.0, "temperature of that nucleus")
    kl_budget: float | None = config_field(None, KL_BUDGET)

    def coefficients(self) -> SteeringCoefficients:
        self.require("ratio", math.isfinite(self.ratio) and self.ratio >= 0, "a finite number ≥ 0")
        self.require("mask_temperature", 1e-6 <= self.mask_temperature <= 1e6, "from 1e-06 to 1e+06")
        if self.mask_top_p is None:
            return contrast_coefficients(self, 1 + self.ratio, self.kl_budget)
        self.require("mask_top_p", 0 < self.mask_top_p <= 1, "above 0 and at most 1, or none")
        if self.kl_budget is not None:
            raise InputError(f"{self.name} takes no kl_budget ({self.kl_budget!r}) together with mask_top_p")
        return contrast_coefficients(
            self, 1 + self.ratio, mask_top_p=self.mask_top_p, mask_temperature=self.mask_temperature
        )


@dataclass(frozen=True, kw_only=True)
class ContextSteering(Method):
    """Context Steering (He et al., 2025) for several contexts: z_0 + strength · Σ w_k (z_k − z_0).

    The paper's λ for its single context is this strength minus 1; it names no default, ours is its λ = 1.
    """

    strength: float = config_field(2.0, "a of z_0 + a (z - z_0); the paper's lambda is a - 1")
    kl_budget: float | None = config_field(None, KL_BUDGET)

    def coefficients(self) -> SteeringCoefficients:
        return contrast_coefficients(self, self.strength, self.kl_budget)


@dataclass(frozen=True, kw_only=True)
class Guidance(Method):
    """Classifier-free guidance for text (Sanchez et al., 2023): (1 − γ) z_0 + γ z_1. CAD is γ = 1 + α."""

    objective_arity = "one"

    guidance_scale: float = config_field(1.5, "gamma of z_0 + gamma (z_1 - z_0); 1 is off")
    kl_budget: float | None = config_field(None, KL_BUDGET)

    def coefficients(self) -> SteeringCoefficients:
        return contrast_coefficients(self, self.guidance_scale, self.kl_budget)


@dataclass(frozen=True, kw_only=True)
class Opad(Method):
    """OPAD (ICLR 2025): (1 + g) z_1 − g z_0 plus g times the previous step's z_1 − z_0; first token z_1."""

    objective_arity = "one"

    gain: float = config_field(1.0, "g; published 1 (HH, summaries) and 0.5 (DSP, P-Soups)")

    def coefficients(self) -> SteeringCoefficients:
        self.require_positive("gain")
        return contrast_coefficients(self, 1 + self.gain, prev_contrast_coef=self.gain)


@dataclass(frozen=True, kw_only=True)
class Amulet(Method):
    """Amulet (Zhang et al., ICLR 2025): T steps of online learning per token toward the objective branch.

    The loop collapses to z_0 + a_T (z_1 − z_0), see `kernels.steering.closed_form`; a_T = 5.6487 as
    published.
    """

    objective_arity = "one"

    alpha: float = config_field(2.0, "weight of the utility, log pi - log pi_base")
    lam: float = config_field(2.0, "weight of the regulariser toward the objective branch")
    eta: float = config_field(10.0, "learning rate")
    iterations: int = config_field(60, "steps of the loop; 0 is off")
    kl_budget: float | None = config_field(None, KL_BUDGET)

    def coefficients(self) -> SteeringCoefficients:
        check_loop_settings(self, "eta")
        return contrast_coefficients(
            self, strength(self.alpha, self.lam, self.eta, self.iterations), self.kl_budget
        )

    def iter_warnings(self) -> Iterator[str]:
        yield from super().iter_warnings()
        if self.alpha > self.lam:
            yield unbounded_warning(self)


@dataclass(frozen=True, kw_only=True)
class Mato(Method):
    """MATO (2026), as far as published: objectives whose weights are re-optimised during decoding.

    Scores z_0 + a_T Σ w_k(t) (z_k − z_0), see `kernels.steering.closed_form`; a_T = 1.9347 as published.
    The weights are w_k ∝ w⁰_k exp(−R_k/τ) with R_k = Σ β [l_k − l_0] over the tokens so far: lagging
    objectives get more weight. Unpublished, so our reading: the utility, sum or mean of rewards, β, and when
    weights first act.

    The preset "balanced" is recommended by docs/evidence.md: strong, in a trust region, with weights that
    stay near the requested ones.
    """

    presets = {"balanced": {"alpha": 2.0, "lam": 2.0, "tau": 20.0, "kl_budget": 0.3}}  # noqa: RUF012 - as above

    alpha: float = config_field(0.5, "weight of the utility")
    lam: float = config_field(1.0, "weight of the regulariser toward the merged policy")
    nu: float = config_field(10.0, "learning rate")
    iterations: int = config_field(80, "steps of the loop")
    tau: float = config_field(
        1.0, "temperature of the weights: small reacts, large stays near the requested weights"
    )
    beta: float = config_field(1.0, "scale of the rewards")
    accumulate: str = config_field("sum", "how rewards add up over the answer", ("sum", "mean", "ema"))
    decay: float = config_field(0.9, "memory of accumulate=ema")
    optimise_weights: bool = config_field(True, "re-optimise the weights as the answer grows")
    optimise_online: bool = config_field(True, "run the optimisation loop; without it the strength is 1")
    utility: str = config_field(
        "policy", "what the loop optimises: log pi - log pi_base, or a fixed reward", ("policy", "reward")
    )
    kl_budget: float | None = config_field(None, KL_BUDGET)

    def coefficients(self) -> SteeringCoefficients:
        check_loop_settings(self, "nu")
        self.require_positive("tau", "beta")
        self.require("tau", math.isfinite(self.beta / self.tau), "large enough for beta / tau to be finite")
        self.require("decay", 0 <= self.decay < 1, "from 0 to below 1")
        return contrast_coefficients(
            self,
            self._compute_strength(),
            self.kl_budget,
            reward_rate=self.beta / self.tau if self.optimise_weights else 0.0,
            beta=self.beta,
            accumulate={"sum": SUM, "mean": MEAN, "ema": EMA}[self.accumulate],
            decay=self.decay,
        )

    def iter_warnings(self) -> Iterator[str]:
        yield from super().iter_warnings()
        if self.optimise_online and self.utility == "policy" and self.alpha > self.lam:
            yield unbounded_warning(self)

    def _compute_strength(self) -> float:
        if not self.optimise_online:
            return 1.0
        if self.utility == "reward":
            return reward_strength(self.alpha * self.beta, self.lam, self.nu, self.iterations)
        return strength(self.alpha, self.lam, self.nu, self.iterations)


@dataclass(frozen=True)
class Mixture(Method):
    """Multi-objective decoding with reverse KL (MOD, Shi et al., 2024), over prompts: Σ w_k z_k."""

    def coefficients(self) -> SteeringCoefficients:
        return SteeringCoefficients(base_coef=0.0, objective_coef=1.0)


def check_loop_settings(method: Amulet | Mato, rate_field: str) -> None:
    """Raise InputError for loop hyperparameters out of range; `rate_field` names the learning rate."""
    method.require_positive("lam", rate_field)
    method.require("alpha", 0 <= method.alpha < math.inf, "a finite number ≥ 0")
    method.require("iterations", 0 <= method.iterations <= 100_000, "an integer from 0 to 100000")


def unbounded_warning(method: Amulet | Mato) -> str:
    """Warning text for a loop with α > λ."""
    return (
        f"{method.name}: alpha={method.alpha!r} is above lam={method.lam!r}, so the strength grows "
        "without bound with the iterations"
    )


METHODS: tuple[type[Method], ...] = (
    Trim, Base, Prompt, LinearAlignment, ContextSteering, Guidance, Opad, Amulet, Mato, Mixture,
)  # fmt: skip
"""All methods, in the order of the README's table."""
