"""Gains: how strongly each objective branch is followed, re-optimised toward the share that was asked.

With intensities i, log-probabilities l of the branches and the tokens y of the answer so far,

    R_k = Σ [l_k(y) − l_0(y)]             what the answer has gained for objective k, in nats
    E_k = Σ KL(π_k ‖ π_0)                 what branch k alone would have gained on average at the same places
    P_k = −Σ KL(π_0 ‖ π_k)                what plain decoding would have gained on average at the same places

and (R_k − P_k) / (E_k − P_k) is the fulfilment: 0 as plain decoding, 1 as branch k alone. The policy that is
nearest to plain decoding and gives the asked shares,

    min_π KL(π ‖ π_0)   subject to   E_π[l_k − l_0] ≥ (1 − i_k) E_π0[l_k − l_0] + i_k E_πk[l_k − l_0],

is π ∝ π_0 exp(Σ g_k (l_k − l_0)), where the gains g are the multipliers of the constraints. They are learnt
from token to token by follow-the-regularised-leader on the losses g_k (r_k − t_k), with each token's reward r
and target t, and the regulariser ‖g − S i‖² / (2κ) over the box [0, G]:

    g_k = clamp(S i_k + κ [(1 − i_k) P_k + i_k E_k − R_k], 0, G)

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

MIN_RANGE = 1.0
"""Nats between E_k and P_k from which on a fulfilment means something."""


@dataclass(frozen=True)
class GainColumns:
    """The gains' columns of the state.

    max_gain:      G, the largest gain of an objective. 0 is off: weights then share `objective_coef`.
    control_rate:  κ, gain per nat that an objective is behind.
    """

    max_gain: float = 0.0
    control_rate: float = 0.0


def compute_gains(
    intensities: Tensor,
    rewards: Tensor,
    branch_rewards: Tensor,
    base_rewards: Tensor,
    params: Mapping[str, Tensor],
) -> tuple[Tensor, Tensor]:
    """(weights [requests, K] of sum 1, strength [requests]): their product is the gain of each objective.

    intensities, rewards R, branch_rewards E and base_rewards P [requests, K], float64. Where all gains are 0,
    the weights are those of the intensities.
    """
    rate, start = params["control_rate"][:, None], params["objective_coef"][:, None]
    behind = base_rewards + intensities * (branch_rewards - base_rewards) - rewards
    gains = start * intensities + rate * behind
    gains = gains.clamp(min=0).minimum(params["max_gain"][:, None]).where(intensities > 0, 0.0)
    strength = gains.cumsum(-1)[:, -1]  # one after the other, as in `rewards.reweight`
    shares = gains.where((strength > 0)[:, None], intensities)
    return shares / shares.cumsum(-1)[:, -1:].clamp(min=1e-300), strength


def accumulate_expected(
    branch_rewards: Tensor,
    base_rewards: Tensor,
    layout: RequestLayout,
    logprobs: Tensor,
    shard: UnshardedVocab,
) -> tuple[Tensor, Tensor]:
    """E_k and P_k [requests, K] with this step's divergences, from log-probabilities [rows, vocab]."""
    import torch  # noqa: PLC0415 - the columns are imported without it

    from .trust_region import row_sum  # noqa: PLC0415 - imports torch

    stacked, branches = layout.stack(logprobs), layout.stack(layout.branch_of_row)[:, 1:]
    probs, contrast = stacked.exp(), stacked[:, 1:] - stacked[:, :1]
    of_base = shard.sum(row_sum(probs[:, :1] * contrast)).clamp(max=0)
    of_branch = shard.sum(row_sum(contrast.mul_(probs[:, 1:]))).clamp(min=0)
    is_row = torch.arange(1, layout.max_rows, device=logprobs.device) < layout.num_rows[:, None]
    requests, places = (is_row & (branches > 0)).nonzero(as_tuple=True)
    objectives = branches[requests, places] - 1
    new_branch, new_base = branch_rewards.clone(), base_rewards.clone()
    new_branch[requests, objectives] += of_branch[requests, places]
    new_base[requests, objectives] += of_base[requests, places]
    valid = layout.has_base[:, None] & new_branch.isfinite() & new_base.isfinite()
    return new_branch.where(valid, branch_rewards), new_base.where(valid, base_rewards)


def fulfilment(
    rewards: Tensor, branch_rewards: Tensor, base_rewards: Tensor, params: Mapping[str, Tensor]
) -> Tensor:
    """(R − P) / (E − P) [requests, K]; NaN where E − P is below `MIN_RANGE`, or R is not the rewards' sum."""
    reward_range = branch_rewards - base_rewards
    known = (reward_range >= MIN_RANGE) & (params["accumulate"] == SUM)[:, None]
    return ((rewards - base_rewards) / reward_range).where(known, float("nan"))


GAINS = Feature(
    is_used=lambda columns: columns["max_gain"] > 0,
    warmup={"max_gain": 4.0, "control_rate": 0.1},
    branch_logprobs=True,
)
