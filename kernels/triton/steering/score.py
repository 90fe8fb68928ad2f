"""Steered scores, logit edits and token selection, per split of the vocabulary.

    s = (1 − a) b + a m on the ray, a from the trust region if the request has one; otherwise s = the mix
    then: ids beyond the tokenizer, support mask, bias and bans, repetition penalty

`score_kernel` stores per split (max, Σ exp) of s, the moments of b + a d and b + d that KL is measured from,
and the best token by s, or for sampled requests by s/T plus Gumbel noise. With top-k, top-p or min-p in the
batch it stores the allowed scores instead, and `sample_truncated_kernel` selects the best token once the
thresholds are known.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .columns import column, load_param
from .gumbel import gumbel_noise
from .masks import FORBIDDEN_LOGIT, forbidden_in_trust_region, outside_nucleus
from .mix_logits import has_nonfinite
from .trust_region import KL_BUDGET, solve_strength, store_moments
from .weights import GREEDY_THRESHOLD, TEMPERATURE

MIN_P = column("min_p")
NO_TOKEN = tl.constexpr(2**31 - 1)
"""Greater than every token id, to mask the search for the lowest."""


@triton.jit
def store_best(best_score_ptr, best_token_ptr, offs, scores, token_ids):
    """Store the largest score of a split and the lowest token id that has it."""
    best_score = tl.max(scores, axis=0)
    tl.store(best_score_ptr + offs, best_score)
    tl.store(best_token_ptr + offs, tl.min(tl.where(scores == best_score, token_ids, NO_TOKEN), axis=0))


@triton.jit
def add_gumbel_noise(scores, token_ids, seed_ptr, temperature, state_row, position):
    """Scores/T plus Gumbel noise."""
    return scores / temperature.to(tl.float32) + gumbel_noise(
        tl.load(seed_ptr + state_row), position, token_ids
    )


@triton.jit(do_not_specialize=["params_stride", "num_splits", "num_reqs", "valid_vocab", "store_scores"])
def score_kernel(
    logits_ptr, mixed_logits_ptr, steered_scores_ptr, allowed_scores_ptr, bias_ptr, repetition_penalty_ptr,
    state_rows_ptr, row_start_ptr,
    num_rows_ptr, coef_ptr, strength_ptr, on_ray_ptr, steps_ptr, params_ptr, params_stride,
    seed_ptr, row_valid_max_ptr,
    centre_ptr, bracket_ptr, inner_sums_ptr, nucleus_threshold_ptr, strength_out_ptr, score_max_ptr,
    score_sum_ptr, kl_sums_ptr, nonfinite_ptr, allowed_max_ptr, best_score_ptr, best_token_ptr,
    vocab_size, valid_vocab, num_splits, num_reqs, store_scores,
    HAS_KL_BUDGET: tl.constexpr, HAS_MASKS: tl.constexpr, HAS_EDITS: tl.constexpr,
    HAS_TRUNCATION: tl.constexpr,
    MEASURE_KL: tl.constexpr, RETURN_LOGPROBS: tl.constexpr, NUM_INNER: tl.constexpr,
    MAX_POINTS: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """bias, repetition_penalty: dense maps of the logit edits, [requests, vocab]. store_scores: with
    RETURN_LOGPROBS also store the steered scores; a runtime argument to limit the compiled variants.
    """
    req_idx, split_idx = tl.program_id(0).to(tl.int64), tl.program_id(1)
    state_row = tl.load(state_rows_ptr + req_idx)
    row_start, num_rows = tl.load(row_start_ptr + req_idx), tl.load(num_rows_ptr + req_idx)
    on_ray = tl.load(on_ray_ptr + req_idx) != 0
    strength = tl.load(strength_ptr + req_idx)
    centre = tl.load(centre_ptr + req_idx)
    scale = tl.where(on_ray, strength, 1.0).to(tl.float32)  # of coefficients, before the trust region
    base_share = tl.where(on_ray, 1.0 - strength, 0.0).to(tl.float32)
    has_kl_budget = strength != strength
    if HAS_KL_BUDGET:
        kl_budget = load_param(params_ptr, params_stride, state_row, KL_BUDGET).to(tl.float32)
        has_kl_budget = kl_budget < float("inf")
        if has_kl_budget:
            bracket, inner_sums = (
                bracket_ptr + req_idx * 6,
                inner_sums_ptr + req_idx * 4 * NUM_INNER * num_splits,
            )
            max_strength = strength.to(tl.float32)
            a_star, centre = solve_strength(
                bracket, inner_sums, max_strength, kl_budget, num_splits, NUM_INNER, MAX_POINTS, BLOCK_S
            )
            strength = tl.where(a_star == max_strength, strength, a_star.to(tl.float64))
    tl.store(strength_out_ptr + req_idx, strength, mask=split_idx == 0)

    offs_v = split_idx * BLOCK_V + tl.arange(0, BLOCK_V)
    mask_v = offs_v < vocab_size
    offs = req_idx * vocab_size + offs_v
    a = strength.to(tl.float32)
    if HAS_MASKS:
        outside_region = forbidden_in_trust_region(
            logits_ptr, coef_ptr, row_valid_max_ptr, params_ptr, params_stride,
            state_row, row_start, num_rows, scale,
            base_share, offs_v, mask_v, vocab_size, num_splits, BLOCK_S,
        )  # fmt: skip
    scores = tl.load(mixed_logits_ptr + offs, mask=mask_v, other=0.0)
    if on_ray:
        base = tl.load(logits_ptr + row_start * vocab_size + offs_v, mask=mask_v, other=float("-inf")).to(
            tl.float32
        )
        if MEASURE_KL | HAS_KL_BUDGET:
            if MEASURE_KL | has_kl_budget:
                direction = tl.where(mask_v, scores - base - centre, 0.0)
                sums_ptr = kl_sums_ptr + req_idx * 8 * num_splits
                region_base = base
                if HAS_MASKS:
                    region_base = tl.where(outside_region, FORBIDDEN_LOGIT, base)
                store_moments(sums_ptr, 0, region_base, direction, 1.0, split_idx, num_splits, 2)
                store_moments(sums_ptr, 1, region_base, direction, a, split_idx, num_splits, 2)
        scores = (1.0 - strength).to(tl.float32) * base + a * scores
    split_offs = req_idx * num_splits + split_idx
    tl.store(nonfinite_ptr + num_reqs * num_splits + split_offs, has_nonfinite(scores, mask_v))
    if RETURN_LOGPROBS:
        if store_scores:
            tl.store(steered_scores_ptr + offs, scores, mask=mask_v)
        valid_scores = tl.where(mask_v, scores, float("-inf"))
        max_score = tl.max(valid_scores, axis=0)
        tl.store(score_max_ptr + split_offs, max_score)
        tl.store(score_sum_ptr + split_offs, tl.sum(tl.exp(valid_scores - max_score), axis=0))

    scores = tl.where((offs_v < valid_vocab) & (scores == scores), scores, float("-inf"))
    if HAS_MASKS:
        forbidden = outside_region | outside_nucleus(
            logits_ptr, nucleus_threshold_ptr, params_ptr, params_stride,
            state_row, req_idx, row_start, num_rows, offs_v,
            mask_v, vocab_size,
        )  # fmt: skip
        scores = tl.where(forbidden, float("-inf"), scores)
    if HAS_EDITS:
        scores += tl.load(bias_ptr + offs, mask=mask_v, other=0.0)
        repetition_penalty = tl.load(repetition_penalty_ptr + offs, mask=mask_v, other=1.0)
        scores = tl.where(scores > 0, scores / repetition_penalty, scores * repetition_penalty)
    if HAS_TRUNCATION:
        tl.store(allowed_scores_ptr + offs, scores, mask=mask_v)
        tl.store(allowed_max_ptr + split_offs, tl.max(scores, axis=0))
    else:
        temperature = load_param(params_ptr, params_stride, state_row, TEMPERATURE)
        if temperature >= GREEDY_THRESHOLD:
            scores = add_gumbel_noise(
                scores, offs_v, seed_ptr, temperature, state_row, tl.load(steps_ptr + state_row)
            )
        store_best(best_score_ptr, best_token_ptr, split_offs, scores, offs_v)


@triton.jit(do_not_specialize=["params_stride", "num_splits"])
def sample_truncated_kernel(
    allowed_scores_ptr, allowed_max_ptr, state_rows_ptr, steps_ptr, params_ptr, params_stride, seed_ptr,
    top_k_threshold_ptr, top_p_threshold_ptr, best_score_ptr, best_token_ptr, vocab_size, num_splits,
    HAS_TOP_K: tl.constexpr, HAS_TOP_P: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Select the best token of a split among those at or above all thresholds."""
    req_idx, split_idx = tl.program_id(0).to(tl.int64), tl.program_id(1)
    state_row = tl.load(state_rows_ptr + req_idx)
    offs_v = split_idx * BLOCK_V + tl.arange(0, BLOCK_V)
    scores = tl.load(
        allowed_scores_ptr + req_idx * vocab_size + offs_v, mask=offs_v < vocab_size, other=float("-inf")
    )
    temperature = load_param(params_ptr, params_stride, state_row, TEMPERATURE)
    if temperature >= GREEDY_THRESHOLD:
        offs_s = tl.arange(0, BLOCK_S)
        maxes = tl.load(
            allowed_max_ptr + req_idx * num_splits + offs_s, mask=offs_s < num_splits, other=float("-inf")
        )
        min_p = load_param(params_ptr, params_stride, state_row, MIN_P).to(tl.float32)
        has_min_p = min_p > 0
        log_min_p = tl.where(
            has_min_p, tl.log(tl.where(has_min_p, min_p, 1.0)) * temperature.to(tl.float32), float("-inf")
        )
        threshold = tl.max(maxes, axis=0) + log_min_p
        if HAS_TOP_K:
            threshold = tl.maximum(threshold, tl.load(top_k_threshold_ptr + req_idx))
        if HAS_TOP_P:
            threshold = tl.maximum(threshold, tl.load(top_p_threshold_ptr + req_idx))
        keep = scores >= threshold
        scores = tl.where(keep, scores, float("-inf"))
        if tl.max(scores, axis=0) > float("-inf"):  # most splits have no token above the threshold
            noisy_scores = add_gumbel_noise(
                scores, offs_v, seed_ptr, temperature, state_row, tl.load(steps_ptr + state_row)
            )
            scores = tl.where(keep, noisy_scores, float("-inf"))
    store_best(best_score_ptr, best_token_ptr, req_idx * num_splits + split_idx, scores, offs_v)
