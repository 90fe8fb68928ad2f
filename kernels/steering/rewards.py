"""MATO's rewards of the objectives, and the weights that are re-optimised from them.

Does not import torch, as the modules of all columns: the methods' settings are listed without it.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .feature import Feature

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from .layout import RequestLayout

SUM, MEAN, EMA = 0, 1, 2
"""How rewards accumulate over the generated tokens: values of `RewardColumns.accumulate`."""


@dataclass(frozen=True)
class RewardColumns:
    """The rewards' columns of the state.

    reward_rate:  β/τ of the weights w_k ∝ w⁰_k exp(−(β/τ) R_k), R_k from l_k − l_0. 0 is off.
    beta:         β alone, for the reported rewards.
    accumulate:   SUM, MEAN or EMA of the rewards so far; `decay` is the EMA's decay.
    """

    reward_rate: float = 0.0
    beta: float = 1.0
    accumulate: int = SUM
    decay: float = 0.9


def reweight(prior: Tensor, rewards: Tensor, reward_rate: Tensor) -> Tensor:
    """w ∝ w⁰ exp(−reward_rate · R): prior, rewards [requests, K]; reward_rate β/τ [requests] → [requests, K].

    The minimiser over the simplex of Σ w_k R_k + τ KL(w ‖ w⁰). Computed in log space relative to the smallest
    reward, so it is stable for any finite rewards and β/τ, and a prior of 0 stays 0. A request without
    objectives has a row of zeros.
    """
    positive = prior > 0
    min_reward = rewards.masked_fill(~positive, math.inf).amin(-1, keepdim=True)
    log_weights = prior.log() - reward_rate[:, None] * (rewards - min_reward).where(positive, 0.0)
    log_weights = log_weights - log_weights.amax(-1, keepdim=True).clamp(min=-sys.float_info.max)
    unnormalised = log_weights.exp()
    # one after the other: `sum` would group a row by the columns that other requests need
    total = unnormalised.cumsum(-1)[:, -1:].clamp(min=1e-300)
    return prior.where((reward_rate == 0)[:, None], unnormalised / total)


def accumulate_rewards(
    rewards: Tensor,
    layout: RequestLayout,
    params: Mapping[str, Tensor],
    steps: Tensor,
    branch_logprobs: Tensor,
) -> Tensor:
    """R_k with the chosen token's l_k − l_0, for rewards [requests, K] after `steps` [requests] tokens."""
    is_objective = layout.branch_of_row > 0
    gains = rewards.new_zeros(rewards.shape)
    row_rewards = (branch_logprobs - branch_logprobs[layout.row_start[layout.request_of_row]]).double()
    gains[layout.request_of_row[is_objective], layout.branch_of_row[is_objective] - 1] = row_rewards[
        is_objective
    ]
    num_steps = (steps + 1)[:, None]
    decay, mode = params["decay"][:, None], params["accumulate"][:, None]
    ema = (decay * rewards + (1 - decay) * gains).where(mode == EMA, rewards + gains)
    new_rewards = (rewards + (gains - rewards) / num_steps).where(mode == MEAN, ema)
    valid = layout.has_base[:, None] & new_rewards.isfinite()
    return new_rewards.where(valid, rewards)


REWARDS = Feature(
    is_used=lambda columns: columns["reward_rate"] != 0, warmup={"reward_rate": 1.0}, branch_logprobs=True
)
