"""Reduce the per-tile results of the fused LM head to the chosen token and its log-normalisers.

One program per branch, or per request if no branch log-probability is needed. It selects the token from the
best of every vocabulary part, as `finalize_kernel` does, multiplies that token's row of W with the branch's
hidden state, and merges the statistics of the parts. `finalize_kernel` then sees one part and a vocabulary of
one token.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..steering.columns import load_param
from ..steering.finalize import merge_stats
from ..steering.score import NO_TOKEN
from ..steering.trust_region import KL_BUDGET, load_moments


@triton.jit
def compute_logit(hidden_ptr, weight_ptr, row, token, HIDDEN_SIZE: tl.constexpr, BLOCK_K: tl.constexpr):
    """One entry of hidden Wᵀ, float32."""
    sums = tl.zeros([BLOCK_K], tl.float32)
    for start_k in range(0, HIDDEN_SIZE, BLOCK_K):
        offs_k = start_k + tl.arange(0, BLOCK_K)
        hidden = tl.load(hidden_ptr + row * HIDDEN_SIZE + offs_k, mask=offs_k < HIDDEN_SIZE, other=0.0).to(
            tl.float32
        )
        weight = tl.load(weight_ptr + token * HIDDEN_SIZE + offs_k, mask=offs_k < HIDDEN_SIZE, other=0.0).to(
            tl.float32
        )
        sums += hidden * weight
    return tl.sum(sums, axis=0)


@triton.jit(do_not_specialize=["params_stride", "num_parts", "num_tiles", "num_reqs"])
def reduce_tiles_kernel(
    hidden_ptr, weight_ptr, state_rows_ptr, row_start_ptr, num_rows_ptr, on_ray_ptr, params_ptr,
    params_stride,
    tile_max_ptr, tile_sum_ptr, tile_contrast_ptr, tile_base_contrast_ptr,
    best_score_ptr, best_token_ptr, nonfinite_ptr, score_max_ptr, score_sum_ptr, token_score_ptr,
    kl_sums_ptr, strength_ptr,
    token_logit_ptr, row_max_ptr, row_sum_ptr, row_contrast_ptr, base_contrast_ptr, out_best_score_ptr,
    out_best_token_ptr,
    out_nonfinite_ptr, out_max_ptr, out_sum_ptr, out_token_score_ptr, out_kl_sums_ptr, out_strength_ptr,
    token_ptr,
    vocab_size, num_parts, num_tiles, num_reqs,
    MATERIALIZE: tl.constexpr, BRANCH_LOGPROBS: tl.constexpr,
    RETURN_LOGPROBS: tl.constexpr, HAS_KL_BUDGET: tl.constexpr,
    MEASURE_KL: tl.constexpr, HIDDEN_SIZE: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_T: tl.constexpr,
):  # fmt: skip
    """token_score: noise-free score of the best token of each part; with MATERIALIZE of every token.

    out_*: the merged results, as one part.
    """
    req_idx, branch_idx = tl.program_id(0).to(tl.int64), tl.program_id(1)
    offs_p = tl.arange(0, BLOCK_P)
    part_offs = req_idx * num_parts + offs_p
    best_scores = tl.load(best_score_ptr + part_offs, mask=offs_p < num_parts, other=float("-inf"))
    best_score = tl.max(best_scores, axis=0)
    tokens = tl.load(best_token_ptr + part_offs, mask=offs_p < num_parts, other=NO_TOKEN)
    token = tl.min(tl.where(best_scores == best_score, tokens, NO_TOKEN), axis=0)
    nonfinite = tl.load(nonfinite_ptr + part_offs, mask=offs_p < num_parts, other=0)
    if MATERIALIZE:
        nonfinite += tl.load(
            nonfinite_ptr + num_reqs * num_parts + part_offs, mask=offs_p < num_parts, other=0
        )
    nonfinite = tl.sum(nonfinite, axis=0)
    failed = (nonfinite != 0) | (best_score == float("-inf"))
    token = tl.where(failed, 0, token).to(tl.int64)
    if branch_idx == 0:
        tl.store(token_ptr + req_idx, token)
        tl.store(out_best_score_ptr + req_idx, best_score)
        tl.store(out_best_token_ptr + req_idx, 0)
        tl.store(out_nonfinite_ptr + req_idx, nonfinite)
        tl.store(out_nonfinite_ptr + num_reqs + req_idx, 0)
        tl.store(out_strength_ptr + req_idx, tl.load(strength_ptr + req_idx))
        if RETURN_LOGPROBS:
            max_value, sum_exp = merge_stats(
                score_max_ptr + req_idx * num_parts, score_sum_ptr + req_idx * num_parts, num_parts, BLOCK_P
            )
            tl.store(out_max_ptr + req_idx, max_value)
            tl.store(out_sum_ptr + req_idx, sum_exp)
            if MATERIALIZE:
                token_score = tl.load(token_score_ptr + req_idx * vocab_size + token)
            else:
                token_scores = tl.load(token_score_ptr + part_offs, mask=offs_p < num_parts, other=0.0)
                token_score = tl.sum(tl.where(tokens == token, token_scores, 0.0), axis=0)
            tl.store(out_token_score_ptr + req_idx, token_score)
        if HAS_KL_BUDGET | MEASURE_KL:
            state_row = tl.load(state_rows_ptr + req_idx)
            has_kl_budget = load_param(params_ptr, params_stride, state_row, KL_BUDGET) < float("inf")
            if (tl.load(on_ray_ptr + req_idx) != 0) & (MEASURE_KL | has_kl_budget):
                maxes, sum_exps, means, variances = load_moments(
                    kl_sums_ptr + req_idx * 8 * num_parts, num_parts, 2, 2, BLOCK_P
                )
                kl_out_ptrs = out_kl_sums_ptr + req_idx * 8 + tl.arange(0, 2)
                tl.store(kl_out_ptrs, maxes)
                tl.store(kl_out_ptrs + 2, sum_exps)
                tl.store(kl_out_ptrs + 4, means * sum_exps)
                tl.store(kl_out_ptrs + 6, (variances + means * means) * sum_exps)
    if BRANCH_LOGPROBS | RETURN_LOGPROBS:
        if branch_idx < tl.load(num_rows_ptr + req_idx):
            row = tl.load(row_start_ptr + req_idx) + branch_idx
            tl.store(
                token_logit_ptr + row, compute_logit(hidden_ptr, weight_ptr, row, token, HIDDEN_SIZE, BLOCK_K)
            )
            if BRANCH_LOGPROBS:
                max_value, sum_exp = merge_stats(
                    tile_max_ptr + row * num_tiles, tile_sum_ptr + row * num_tiles, num_tiles, BLOCK_T
                )
                tl.store(row_max_ptr + row, max_value)
                tl.store(row_sum_ptr + row, sum_exp)
                _, contrast = merge_stats(
                    tile_max_ptr + row * num_tiles, tile_contrast_ptr + row * num_tiles, num_tiles, BLOCK_T
                )
                tl.store(row_contrast_ptr + row, contrast)
                base_row = tl.load(row_start_ptr + req_idx)
                _, contrast = merge_stats(
                    tile_max_ptr + base_row * num_tiles, tile_base_contrast_ptr + row * num_tiles, num_tiles,
                    BLOCK_T,
                )  # fmt: skip
                tl.store(base_contrast_ptr + row, contrast)
