"""Closed form of the online optimisation loop of Amulet and MATO: one scalar per request.

The published loop (Amulet, ICLR 2025) runs follow-the-regularised-leader over the token distribution for
T steps per token. From base b = l_0 and anchor p, with log π_0 = p:

    U_t     = α (log π_{t−1} − b)
    log π_t ≃ [ λ p + (1/t) Σ_{s≤t} U_s + log π_{t−1}/(η t) ] / [ λ + 1/(η t) ]

If every earlier iterate is b + a_s (p − b) up to a constant, each term is affine in (p, b) with
coefficients that sum to λ + 1/(η t), so the next iterate is too, with

    a_0 = 1,   a_t = [ λ + (α/t) Σ_{s<t} a_s + a_{t−1}/(η t) ] / [ λ + 1/(η t) ]

The loop therefore costs T scalar steps per request and nothing per token. With the fixed utility
U = αβ (p − b) the middle term is αβ, and a → 1 + αβ/λ.

The literal loops over `[V]` vectors in float64 are the reference that the closed form is tested against.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def strength(alpha: float, lam: float, eta: float, iterations: int) -> float:
    """a_T of the published loop, whose utility is α (log π − b)."""
    a, sum_a = 1.0, 0.0
    for t in range(1, iterations + 1):
        sum_a += a
        a = (lam + alpha * sum_a / t + a / (eta * t)) / (lam + 1 / (eta * t))
    return a


def reward_strength(gain: float, lam: float, eta: float, iterations: int) -> float:
    """a_T when the utility is the fixed reward gain · (p − b), gain = αβ."""
    a = 1.0
    for t in range(1, iterations + 1):
        a = (lam + gain + a / (eta * t)) / (lam + 1 / (eta * t))
    return a


def unrolled_loop(
    base: Tensor, anchor: Tensor, alpha: float, lam: float, eta: float, iterations: int
) -> Tensor:
    """log π_T of the published loop by T vector steps, normalised every step. base, anchor: log-probs [V]."""
    base, anchor = base.double(), anchor.double()
    policy, utilities = anchor, 0 * anchor
    for t in range(1, iterations + 1):
        utilities = utilities + alpha * (policy - base)
        scores = (lam * anchor + utilities / t + policy / (eta * t)) / (lam + 1 / (eta * t))
        policy = scores.log_softmax(-1)
    return policy


def unrolled_reward_loop(
    base: Tensor, anchor: Tensor, gain: float, lam: float, eta: float, iterations: int
) -> Tensor:
    """log π_T by T vector steps when the utility is the fixed reward gain · (anchor − base)."""
    base, anchor = base.double(), anchor.double()
    policy, reward = anchor, gain * (anchor - base)
    for t in range(1, iterations + 1):
        scores = (lam * anchor + reward + policy / (eta * t)) / (lam + 1 / (eta * t))
        policy = scores.log_softmax(-1)
    return policy
