"""The last launch of a steering step, one program per request: token, trace and next state.

R_k ← R_k + l_k(y) − l_0(y)  (or their mean, or a moving average),  l = log-softmax of the branch logits
E_k ← E_k + KL(π_k ‖ π_0),  P_k ← P_k − KL(π_0 ‖ π_k),  see `kernels.steering.gains`
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...steering.gains import MIN_RANGE as REFERENCE_MIN_RANGE
from ...steering.rewards import EMA as REFERENCE_EMA
from ...steering.rewards import MEAN as REFERENCE_MEAN
from ...steering.rewards import SUM as REFERENCE_SUM
from .columns import column, load_param
from .score import NO_TOKEN
from .trust_region import KL_BUDGET, kl_divergence, load_moments, select

ACCUMULATE, DECAY = column("accumulate"), column("decay")
BLOCK_R = 8
SUM, MEAN, EMA = tl.constexpr(REFERENCE_SUM), tl.constexpr(REFERENCE_MEAN), tl.constexpr(REFERENCE_EMA)
MIN_RANGE = tl.constexpr(REFERENCE_MIN_RANGE)


@triton.jit
def merge_stats(max_ptr, sum_exp_ptr, num_splits, BLOCK_S: tl.constexpr):
    """(max, Σ exp) of a row from those of its splits."""
    offs_s = tl.arange(0, BLOCK_S)
    maxes = tl.load(max_ptr + offs_s, mask=offs_s < num_splits, other=float("-inf"))
    max_value = tl.max(maxes, axis=0)
    sum_exp = tl.load(sum_exp_ptr + offs_s, mask=offs_s < num_splits, other=0.0)
    return max_value, tl.sum(sum_exp * tl.exp(maxes - max_value), axis=0)


@triton.jit
def merge_logsumexp(max_ptr, sum_exp_ptr, num_splits, BLOCK_S: tl.constexpr):
    """logsumexp of a row from (max, Σ exp) of its splits."""
    max_value, sum_exp = merge_stats(max_ptr, sum_exp_ptr, num_splits, BLOCK_S)
    return max_value + tl.log(sum_exp)


@triton.jit
def load_branch_stats(
    logits_ptr, row_max_ptr, row_sum_ptr, row_contrast_ptr, base_contrast_ptr, rows, mask_r, base_row, token,
    vocab_size, num_splits, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """In each row `rows` of the logits: the token's log-probability, the logsumexp, and the mean of z − z_0
    under the row and under the base row.
    """
    offs_s = tl.arange(0, BLOCK_S)[None, :]
    offs, mask = rows[:, None] * num_splits + offs_s, mask_r[:, None] & (offs_s < num_splits)
    split_maxes = tl.load(row_max_ptr + offs, mask=mask, other=float("-inf"))
    row_max = tl.where(mask_r, tl.max(split_maxes, axis=1), 0.0)
    sum_exp = tl.load(row_sum_ptr + offs, mask=mask, other=0.0) * tl.exp(split_maxes - row_max[:, None])
    row_sum = tl.where(mask_r, tl.sum(sum_exp, axis=1), 1.0)
    lse = row_max + tl.log(row_sum)
    contrast = tl.load(row_contrast_ptr + offs, mask=mask, other=0.0)
    mean_contrast = tl.sum(contrast * tl.exp(split_maxes - row_max[:, None]), axis=1) / row_sum
    base_offs, mask_s = base_row * num_splits + offs_s, offs_s < num_splits
    base_maxes = tl.load(row_max_ptr + base_offs, mask=mask_s, other=float("-inf"))
    base_scale = tl.exp(base_maxes - tl.max(base_maxes, axis=1)[:, None])
    base_sum = tl.load(row_sum_ptr + base_offs, mask=mask_s, other=0.0)
    base_contrast = tl.load(base_contrast_ptr + offs, mask=mask, other=0.0)
    base_mean = tl.sum(base_contrast * base_scale, axis=1) / tl.sum(base_sum * base_scale, axis=1)
    logit = tl.load(logits_ptr + rows * vocab_size + token, mask=mask_r, other=0.0).to(tl.float32)
    return logit - lse, lse, mean_contrast, base_mean


@triton.jit(do_not_specialize=["params_stride", "num_splits", "num_reqs", "max_objectives"])
def finalize_kernel(
    logits_ptr, mixed_logits_ptr, state_rows_ptr, row_start_ptr, num_rows_ptr, branch_ptr,
    params_ptr, params_stride,
    rewards_ptr, branch_rewards_ptr, base_rewards_ptr, steps_ptr, strength_ptr, on_ray_ptr, row_max_ptr,
    row_sum_ptr,
    row_contrast_ptr, base_contrast_ptr, score_max_ptr, score_sum_ptr, kl_sums_ptr, nonfinite_ptr,
    best_score_ptr,
    best_token_ptr, token_ptr, failed_ptr, logprob_ptr, kl_ptr, branch_logprob_ptr, fulfilment_ptr,
    lse_ptr, vocab_size, num_splits, num_reqs, max_objectives,
    HAS_KL_BUDGET: tl.constexpr, MEASURE_KL: tl.constexpr, RETURN_LOGPROBS: tl.constexpr,
    BRANCH_LOGPROBS: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    req_idx = tl.program_id(0).to(tl.int64)
    state_row = tl.load(state_rows_ptr + req_idx)
    row_start, num_rows = tl.load(row_start_ptr + req_idx), tl.load(num_rows_ptr + req_idx)
    offs_s = tl.arange(0, BLOCK_S)
    split_offs = req_idx * num_splits + offs_s
    best_scores = tl.load(best_score_ptr + split_offs, mask=offs_s < num_splits, other=float("-inf"))
    best_score = tl.max(best_scores, axis=0)
    tokens = tl.load(best_token_ptr + split_offs, mask=offs_s < num_splits, other=NO_TOKEN)
    token = tl.min(tl.where(best_scores == best_score, tokens, NO_TOKEN), axis=0)
    nonfinite = tl.load(nonfinite_ptr + split_offs, mask=offs_s < num_splits, other=0)
    nonfinite += tl.load(
        nonfinite_ptr + num_reqs * num_splits + split_offs, mask=offs_s < num_splits, other=0
    )
    nonfinite = tl.sum(nonfinite, axis=0)
    failed = (nonfinite != 0) | (best_score == float("-inf"))
    token = tl.where(failed, 0, token).to(tl.int64)
    tl.store(token_ptr + req_idx, token)
    tl.store(failed_ptr + req_idx, failed.to(tl.uint8))

    strength = tl.load(strength_ptr + req_idx)
    on_ray = tl.load(on_ray_ptr + req_idx) != 0
    if RETURN_LOGPROBS:
        score = tl.load(mixed_logits_ptr + req_idx * vocab_size + token)
        if on_ray:
            base = tl.load(logits_ptr + row_start * vocab_size + token).to(tl.float32)
            score = (1.0 - strength).to(tl.float32) * base + strength.to(tl.float32) * score
        lse = merge_logsumexp(
            score_max_ptr + req_idx * num_splits, score_sum_ptr + req_idx * num_splits, num_splits, BLOCK_S
        )
        tl.store(lse_ptr + req_idx, lse)
        tl.store(logprob_ptr + req_idx, score - lse)
    else:
        tl.store(logprob_ptr + req_idx, float("nan"))

    kl = tl.zeros([], tl.float32) + float("nan")
    if MEASURE_KL | HAS_KL_BUDGET:
        has_kl_budget = load_param(params_ptr, params_stride, state_row, KL_BUDGET) < float("inf")
        if on_ray & (MEASURE_KL | has_kl_budget):
            maxes, sum_exps, means, _ = load_moments(
                kl_sums_ptr + req_idx * 8 * num_splits, num_splits, 2, 2, BLOCK_S
            )
            point_idx = tl.arange(0, 2)
            a = tl.where(point_idx == 0, 1.0, strength.to(tl.float32))
            max_one, sum_one, mean_one = (
                select(maxes, point_idx, 0),
                select(sum_exps, point_idx, 0),
                select(means, point_idx, 0),
            )
            kls = kl_divergence(a, maxes, sum_exps, means, max_one, sum_one, mean_one)
            kl = select(kls, point_idx, 1)
            kl = tl.where(kl < 0, 0.0, kl)
    tl.store(kl_ptr + req_idx, kl.to(tl.float64))

    num_tokens = tl.load(steps_ptr + state_row) + 1
    tl.store(steps_ptr + state_row, num_tokens)
    accumulate = load_param(params_ptr, params_stride, state_row, ACCUMULATE)
    decay = load_param(params_ptr, params_stride, state_row, DECAY)
    has_base = tl.load(branch_ptr + row_start) == 0
    offs_r = tl.arange(0, BLOCK_R)
    for start_o in range(0, max_objectives, BLOCK_O):
        offs_o = start_o + tl.arange(0, BLOCK_O)
        mask_o = offs_o < max_objectives
        contrast_sums, of_branch, of_base = (
            tl.zeros([BLOCK_O], tl.float32),
            tl.zeros([BLOCK_O], tl.float32),
            tl.zeros([BLOCK_O], tl.float32),
        )
        base, base_lse = tl.zeros([], tl.float32), tl.zeros([], tl.float32)
        for start_r in range(0, num_rows, BLOCK_R):
            mask_r = start_r + offs_r < num_rows
            rows = row_start + start_r + offs_r
            logprobs = tl.full([BLOCK_R], float("nan"), tl.float32)
            if BRANCH_LOGPROBS:
                logprobs, lses, mean_contrasts, base_means = load_branch_stats(
                    logits_ptr, row_max_ptr, row_sum_ptr, row_contrast_ptr, base_contrast_ptr, rows, mask_r,
                    row_start, token, vocab_size, num_splits, BLOCK_S,
                )  # fmt: skip
                base = tl.where(start_r == 0, tl.sum(tl.where(offs_r == 0, logprobs, 0.0), axis=0), base)
                branch = tl.load(branch_ptr + rows, mask=mask_r, other=0)
                is_objective = (branch[:, None] - 1 == offs_o[None, :]) & mask_r[:, None]
                contrast_sums += tl.sum(tl.where(is_objective, logprobs[:, None] - base, 0.0), axis=0)
                first_lse = tl.sum(tl.where(offs_r == 0, lses, 0.0), axis=0)
                base_lse = tl.where(start_r == 0, first_lse, base_lse)
                expected = mean_contrasts - (lses - base_lse)
                expected = tl.where(expected < 0, 0.0, expected)[:, None]
                of_branch += tl.sum(tl.where(is_objective, expected, 0.0), axis=0)
                expected = base_means - (lses - base_lse)
                expected = tl.where(expected > 0, 0.0, expected)[:, None]
                of_base += tl.sum(tl.where(is_objective, expected, 0.0), axis=0)
            tl.store(branch_logprob_ptr + rows, logprobs, mask=mask_r)
        if BRANCH_LOGPROBS:
            reward_ptrs = rewards_ptr + state_row * max_objectives + offs_o
            prev_rewards = tl.load(reward_ptrs, mask=mask_o, other=0.0)
            gains = contrast_sums.to(tl.float64)
            new_rewards = prev_rewards + gains
            new_rewards = tl.where(
                accumulate == MEAN,
                prev_rewards + (gains - prev_rewards) / num_tokens.to(tl.float64),
                new_rewards,
            )
            new_rewards = tl.where(
                accumulate == EMA, decay * prev_rewards + (1.0 - decay) * gains, new_rewards
            )
            valid = has_base & (tl.abs(new_rewards) < float("inf"))
            new_rewards = tl.where(valid, new_rewards, prev_rewards)
            tl.store(reward_ptrs, new_rewards, mask=mask_o)
            state_offs = state_row * max_objectives + offs_o
            branch_ptrs, base_ptrs = branch_rewards_ptr + state_offs, base_rewards_ptr + state_offs
            prev_branch = tl.load(branch_ptrs, mask=mask_o, other=0.0)
            prev_base = tl.load(base_ptrs, mask=mask_o, other=0.0)
            new_branch, new_base = prev_branch + of_branch.to(tl.float64), prev_base + of_base.to(tl.float64)
            valid = has_base & (tl.abs(new_branch - new_base) < float("inf"))
            new_branch, new_base = (
                tl.where(valid, new_branch, prev_branch),
                tl.where(valid, new_base, prev_base),
            )
            tl.store(branch_ptrs, new_branch, mask=mask_o)
            tl.store(base_ptrs, new_base, mask=mask_o)
            reward_range = new_branch - new_base
            is_known = tl.where(accumulate == SUM, reward_range, 0.0) >= MIN_RANGE
            fulfilment = (new_rewards - new_base) / tl.where(is_known, reward_range, 1.0)
            fulfilment = tl.where(is_known, fulfilment, float("nan"))
            tl.store(fulfilment_ptr + req_idx * max_objectives + offs_o, fulfilment, mask=mask_o)
