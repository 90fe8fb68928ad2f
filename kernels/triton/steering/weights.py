"""MATO weights and mixing coefficients: the first launch of a steering step, one program per request.

    w_k ∝ w⁰_k exp(−(β/τ) (R_k − min R))        in log space and float64, as `steering.rewards.reweight`
    w_k ∝ g_k = clamp(S i_k + κ [P_k + i_k (E_k − P_k) − R_k], 0, G), strength Σ g_k, as `steering.gains`

Objectives are summed in chunks of fixed size, padded with zeros, so that a request's weights do not depend on
the number of objectives of other requests. A request whose scores lie on the ray b + a (m − b) gets the
coefficients of m, the merged logits; b is added once a is known. The limits of the truncation filters (mask,
top-k, top-p; 0 is off) are stored for `find_thresholds`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...steering.sampling import GREEDY_BELOW
from .columns import column, load_param
from .top_k_top_p import NUCLEUS, TOP_K, TOP_P

BLOCK_O = 32
GREEDY_THRESHOLD = tl.constexpr(GREEDY_BELOW)
BASE_COEF, OBJECTIVE_COEF, PREV_CONTRAST_COEF = (
    column("base_coef"),
    column("objective_coef"),
    column("prev_contrast_coef"),
)
REWARD_RATE, BETA, KL_BUDGET = column("reward_rate"), column("beta"), column("kl_budget")
MAX_GAIN, CONTROL_RATE = column("max_gain"), column("control_rate")
TEMPERATURE, MASK_TOP_P = column("temperature"), column("mask_top_p")
TOP_K_COLUMN, TOP_P_COLUMN = column("top_k"), column("top_p")


@triton.jit
def log_weights(prior_weights_ptr, rewards_ptr, offs, mask, reward_rate, min_reward):
    """(log w⁰ − reward_rate · (R − min R), w⁰) of the state entries `offs`; −∞ where w⁰ is 0."""
    prior = tl.load(prior_weights_ptr + offs, mask=mask, other=0.0)
    rewards = tl.load(rewards_ptr + offs, mask=mask, other=0.0)
    is_active = prior > 0
    log_prior = tl.log(tl.where(is_active, prior, 1.0))
    return tl.where(is_active, log_prior - reward_rate * (rewards - min_reward), float("-inf")), prior


@triton.jit
def load_gains(
    intensities_ptr, rewards_ptr, branch_rewards_ptr, base_rewards_ptr, offs, mask,
    start_gain, control_rate, max_gain,
):  # fmt: skip
    """(gains, intensities) of the state entries `offs`."""
    intensities = tl.load(intensities_ptr + offs, mask=mask, other=0.0)
    rewards = tl.load(rewards_ptr + offs, mask=mask, other=0.0)
    branch_rewards = tl.load(branch_rewards_ptr + offs, mask=mask, other=0.0)
    base_rewards = tl.load(base_rewards_ptr + offs, mask=mask, other=0.0)
    behind = base_rewards + intensities * (branch_rewards - base_rewards) - rewards
    gains = start_gain * intensities + control_rate * behind
    gains = tl.minimum(tl.maximum(gains, 0.0), max_gain)
    return tl.where(intensities > 0, gains, 0.0), intensities


@triton.jit
def load_weights(
    prior_weights_ptr, rewards_ptr, branch_rewards_ptr, base_rewards_ptr, offs, mask,
    reward_rate, min_reward, max_value, denom,
    start_gain, control_rate, max_gain, strength, sum_shares,
):  # fmt: skip
    """The weights of the state entries `offs`: w⁰, re-optimised from rewards, or the shares of the gains."""
    log_w, prior = log_weights(prior_weights_ptr, rewards_ptr, offs, mask, reward_rate, min_reward)
    weights = tl.where(reward_rate == 0, prior, tl.exp(log_w - max_value) / denom)
    gains, _ = load_gains(
        prior_weights_ptr,
        rewards_ptr,
        branch_rewards_ptr,
        base_rewards_ptr,
        offs,
        mask,
        start_gain,
        control_rate,
        max_gain,
    )
    return tl.where(max_gain > 0, tl.where(strength > 0, gains, prior) / sum_shares, weights)


@triton.jit(do_not_specialize=["params_stride", "vocab_size", "max_objectives"])
def reweight_kernel(
    state_rows_ptr, row_start_ptr, num_rows_ptr, branch_ptr, prior_weights_ptr, rewards_ptr,
    branch_rewards_ptr, base_rewards_ptr,
    steps_ptr,
    params_ptr, params_stride,
    weights_ptr, scaled_rewards_ptr, coef_ptr, strength_ptr, on_ray_ptr, truncation_ptr, vocab_size,
    max_objectives,
    BLOCK_O: tl.constexpr,
):  # fmt: skip
    req_idx = tl.program_id(0).to(tl.int64)
    state_row = tl.load(state_rows_ptr + req_idx)
    row_start, num_rows = tl.load(row_start_ptr + req_idx), tl.load(num_rows_ptr + req_idx)
    reward_rate = load_param(params_ptr, params_stride, state_row, REWARD_RATE)
    beta = load_param(params_ptr, params_stride, state_row, BETA)
    prev_contrast_coef = load_param(params_ptr, params_stride, state_row, PREV_CONTRAST_COEF)
    is_first_step = (prev_contrast_coef != 0) & (tl.load(steps_ptr + state_row) == 0)
    base_coef = tl.where(is_first_step, 0.0, load_param(params_ptr, params_stride, state_row, BASE_COEF))
    objective_coef = tl.where(
        is_first_step, 1.0, load_param(params_ptr, params_stride, state_row, OBJECTIVE_COEF)
    )
    has_kl_budget = load_param(params_ptr, params_stride, state_row, KL_BUDGET) < float("inf")
    has_base = (tl.load(branch_ptr + row_start) == 0) & (num_rows > 1)
    on_ray = has_kl_budget | (has_base & (base_coef == 1.0 - objective_coef) & (prev_contrast_coef == 0))

    lanes = tl.arange(0, BLOCK_O)
    min_rewards = tl.full([BLOCK_O], float("inf"), tl.float64)
    for start_o in range(0, max_objectives, BLOCK_O):
        offs_o = start_o + lanes
        prior = tl.load(
            prior_weights_ptr + state_row * max_objectives + offs_o, mask=offs_o < max_objectives, other=0.0
        )
        rewards = tl.load(
            rewards_ptr + state_row * max_objectives + offs_o, mask=offs_o < max_objectives, other=0.0
        )
        min_rewards = tl.minimum(min_rewards, tl.where(prior > 0, rewards, float("inf")))
    min_reward = tl.min(min_rewards, axis=0)
    maxes = tl.full([BLOCK_O], float("-inf"), tl.float64)
    for start_o in range(0, max_objectives, BLOCK_O):
        offs_o = start_o + lanes
        log_w, _ = log_weights(
            prior_weights_ptr,
            rewards_ptr,
            state_row * max_objectives + offs_o,
            offs_o < max_objectives,
            reward_rate,
            min_reward,
        )
        maxes = tl.maximum(maxes, log_w)
    max_value = tl.max(maxes, axis=0)
    max_value = tl.where(max_value == float("-inf"), 0.0, max_value)
    max_gain = load_param(params_ptr, params_stride, state_row, MAX_GAIN)
    control_rate = load_param(params_ptr, params_stride, state_row, CONTROL_RATE)
    sum_exp = tl.zeros([BLOCK_O], tl.float64)
    sum_gains, sum_intensities = tl.zeros([BLOCK_O], tl.float64), tl.zeros([BLOCK_O], tl.float64)
    for start_o in range(0, max_objectives, BLOCK_O):
        offs_o = start_o + lanes
        offs, mask = state_row * max_objectives + offs_o, offs_o < max_objectives
        log_w, _ = log_weights(prior_weights_ptr, rewards_ptr, offs, mask, reward_rate, min_reward)
        sum_exp += tl.exp(log_w - max_value)
        gains, intensities = load_gains(
            prior_weights_ptr,
            rewards_ptr,
            branch_rewards_ptr,
            base_rewards_ptr,
            offs,
            mask,
            objective_coef,
            control_rate,
            max_gain,
        )
        sum_gains, sum_intensities = sum_gains + gains, sum_intensities + intensities
    denom = tl.sum(sum_exp, axis=0)
    denom = tl.where(denom > 0, denom, 1.0)
    strength = tl.where(max_gain > 0, tl.sum(sum_gains, axis=0), objective_coef)
    sum_shares = tl.where(strength > 0, strength, tl.sum(sum_intensities, axis=0))
    sum_shares = tl.where(sum_shares > 0, sum_shares, 1.0)
    for start_o in range(0, max_objectives, BLOCK_O):
        offs_o = start_o + lanes
        mask = offs_o < max_objectives
        weights = load_weights(
            prior_weights_ptr, rewards_ptr, branch_rewards_ptr, base_rewards_ptr,
            state_row * max_objectives + offs_o, mask,
            reward_rate, min_reward, max_value, denom,
            objective_coef, control_rate, max_gain, strength, sum_shares,
        )  # fmt: skip
        tl.store(weights_ptr + req_idx * max_objectives + offs_o, weights, mask=mask)
        rewards = tl.load(rewards_ptr + state_row * max_objectives + offs_o, mask=mask, other=0.0)
        tl.store(scaled_rewards_ptr + req_idx * max_objectives + offs_o, rewards * beta, mask=mask)
    for start_o in range(0, num_rows, BLOCK_O):
        branch_offs = start_o + lanes
        mask = branch_offs < num_rows
        branch = tl.load(branch_ptr + row_start + branch_offs, mask=mask, other=0)
        is_objective = branch > 0
        offs = state_row * max_objectives + tl.where(is_objective, branch - 1, 0)
        weight = load_weights(
            prior_weights_ptr, rewards_ptr, branch_rewards_ptr, base_rewards_ptr, offs, mask & is_objective,
            reward_rate, min_reward, max_value, denom,
            objective_coef, control_rate, max_gain, strength, sum_shares,
        )  # fmt: skip
        off_ray_coef = tl.where(is_objective, objective_coef * weight, base_coef)
        on_ray_coef = tl.where(is_objective, weight, 0.0)
        coef = tl.where(on_ray, on_ray_coef, off_ray_coef)
        tl.store(coef_ptr + row_start + branch_offs, coef.to(tl.float32), mask=mask)
    tl.store(strength_ptr + req_idx, strength)
    tl.store(on_ray_ptr + req_idx, on_ray.to(tl.int32))
    is_sampled = load_param(params_ptr, params_stride, state_row, TEMPERATURE) >= GREEDY_THRESHOLD
    mask_top_p = load_param(params_ptr, params_stride, state_row, MASK_TOP_P)
    top_p = load_param(params_ptr, params_stride, state_row, TOP_P_COLUMN)
    top_k = load_param(params_ptr, params_stride, state_row, TOP_K_COLUMN)
    limits_ptr = truncation_ptr + req_idx * 3
    tl.store(limits_ptr + NUCLEUS, tl.where(mask_top_p < 1, mask_top_p, 0.0))
    tl.store(limits_ptr + TOP_K, tl.where(is_sampled & (top_k < vocab_size), top_k, 0).to(tl.float64))
    tl.store(limits_ptr + TOP_P, tl.where(is_sampled & (top_p < 1), top_p, 0.0))
