"""Gains: how strongly each objective branch is followed, re-optimised toward the share that was asked.

With intensities i, log-probabilities l of the branches and the tokens y of the answer so far,

    R_k = Σ [l_k(y) − l_0(y)]             what the answer has gained for objective k, in nats
    E_k = Σ KL(π_k ‖ π_0)                 what branch k alone would have gained on average at the same places

and R_k / E_k is the fulfilment: on average 1 where branch k decodes alone, and at or below 0 in plain
decoding, where E[l_k − l_0] = −KL(π_0 ‖ π_k). The policy nearest to plain decoding with these shares,

    min_π KL(π ‖ π_0)   subject to   E_π[l_k − l_0] ≥ i_k KL(π_k ‖ π_0)   for every k,

is π ∝ π_0 exp(Σ g_k (l_k − l_0)), where the gains g are the multipliers of the constraints. They are learnt
from token to token by follow-the-regularised-leader on the losses g_k (r_k − i_k e_k), with the tokens' own r
and e and the regulariser ‖g − S i‖² / (2κ) over the box [0, G]:

    g_k = clamp(S i_k + κ (i_k E_k − R_k), 0, G)

S is `objective_coef`. An objective that leads by S i_k / κ nats or more has no gain until it is due again.

Does not import torch, as the modules of all columns: the methods' settings are listed without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .feature import Feature
from .rewards import SUM

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from ..distributed.vocab_parallel import UnshardedVocab
    from .layout import RequestLayout

MIN_TARGET = 1.0
"""Nats that E_k needs before a fulfilment R_k / E_k means something."""


@dataclass(frozen=True)
class GainColumns:
    """The gains' columns of the state.

    max_gain:      G, the largest gain of an objective. 0 is off: weights then share `objective_coef`.
    control_rate:  κ, gain per nat that an objective is behind.
    """

    max_gain: float = 0.0
    control_rate: float = 0.0


def compute_gains(
    intensities: Tensor, rewards: Tensor, targets: Tensor, params: Mapping[str, Tensor]
) -> tuple[Tensor, Tensor]:
    """(weights [requests, K] of sum 1, strength [requests]): their product is the gain of each objective.

    intensities, rewards R, targets E [requests, K], float64. Where all gains are 0, the weights are those of
    the intensities.
    """
    rate, start = params["control_rate"][:, None], params["objective_coef"][:, None]
    gains = start * intensities + rate * (intensities * targets - rewards)
    gains = gains.clamp(min=0).minimum(params["max_gain"][:, None]).where(intensities > 0, 0.0)
    strength = gains.cumsum(-1)[:, -1]  # one after the other, as in `rewards.reweight`
    shares = gains.where((strength > 0)[:, None], intensities)
    return shares / shares.cumsum(-1)[:, -1:].clamp(min=1e-300), strength


def accumulate_targets(
    targets: Tensor, layout: RequestLayout, logprobs: Tensor, shard: UnshardedVocab
) -> Tensor:
    """E_k with this step's KL(π_k ‖ π_0), for targets [requests, K] and log-probabilities [rows, vocab]."""
    from .trust_region import row_sum  # noqa: PLC0415 - imports torch

    rows = (layout.branch_of_row > 0).nonzero()[:, 0]
    objective = logprobs[rows]
    contrast = objective - logprobs[layout.row_start[layout.request_of_row[rows]]]
    divergence = shard.sum(row_sum(objective.exp_().mul_(contrast)))
    new_targets = targets.clone()
    new_targets[layout.request_of_row[rows], layout.branch_of_row[rows] - 1] += divergence.clamp(min=0)
    return new_targets.where(layout.has_base[:, None] & new_targets.isfinite(), targets)


def fulfilment(rewards: Tensor, targets: Tensor, params: Mapping[str, Tensor]) -> Tensor:
    """R / E [requests, K]; NaN where E is below `MIN_TARGET`, or R is not the sum of the rewards."""
    known = (targets >= MIN_TARGET) & (params["accumulate"] == SUM)[:, None]
    return (rewards / targets).where(known, float("nan"))


GAINS = Feature(
    is_used=lambda columns: columns["max_gain"] > 0,
    warmup={"max_gain": 4.0, "control_rate": 0.1},
    branch_logprobs=True,
)
