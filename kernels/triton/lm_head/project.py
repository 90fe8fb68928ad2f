"""LM head and branch mixing in one pass; the logits stay in registers.

    mix_hidden_kernel  (request, hidden tile)           Σ c h, one row per request, if no branch is needed
                                                        separately
    lm_head_kernel     (request tile, vocabulary tile)  z = W h, reduced as follows

A row tile holds BLOCK_M // BRANCH_SLOTS requests with BRANCH_SLOTS rows each, so that requests with different
numbers of branches share one product, each weight is read once for all of them, and the rows of a request are
adjacent. Branches are mixed in order, whatever else is in the tile. Stored are (max, Σ exp) of z per row, for
E_k and P_k of `kernels.steering.gains` also sums of z − z_0, and, of the scores s = Σ c z, either the best
token of the tile, or two rows per request: its first branch, and Σ c z of the others (a single other branch
unscaled), with the coefficients that combine them to s.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..steering.gumbel import gumbel_noise
from ..steering.score import NO_TOKEN
from ..steering.weights import GREEDY_THRESHOLD


@triton.jit
def load_coef(coef_ptr, strength_ptr, on_ray_ptr, req_idx, row, branch_idx, mask):
    """Branch coefficients of the scores, float32; on the ray b + a (m − b) including the base term 1 − a."""
    coef = tl.load(coef_ptr + row, mask=mask, other=0.0)
    strength = tl.load(strength_ptr + req_idx, mask=mask, other=0.0)
    base_term = tl.where(branch_idx == 0, 1.0 - strength, 0.0)
    off_ray = tl.load(on_ray_ptr + req_idx, mask=mask, other=0) == 0
    return tl.where(off_ray, coef, strength.to(tl.float32) * coef + base_term.to(tl.float32))


@triton.jit
def mix_hidden_kernel(
    hidden_ptr, row_start_ptr, num_rows_ptr, coef_ptr, strength_ptr, on_ray_ptr, high_ptr, low_ptr,
    HIDDEN_SIZE: tl.constexpr, BLOCK_K: tl.constexpr, HAS_LOW: tl.constexpr,
):  # fmt: skip
    """HAS_LOW: store the rounding error of `high` in `low`; the two products add up to that of the sum."""
    req_idx = tl.program_id(0).to(tl.int64)
    offs_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    row_start, num_rows = tl.load(row_start_ptr + req_idx), tl.load(num_rows_ptr + req_idx)
    acc = tl.zeros([BLOCK_K], tl.float32)
    for branch_idx in range(num_rows):
        row = row_start + branch_idx
        hidden = tl.load(hidden_ptr + row * HIDDEN_SIZE + offs_k, mask=offs_k < HIDDEN_SIZE, other=0.0).to(
            tl.float32
        )
        acc += hidden * load_coef(
            coef_ptr, strength_ptr, on_ray_ptr, req_idx, row, row - row_start, num_rows > 0
        )
    high = acc.to(high_ptr.dtype.element_ty)
    tl.store(high_ptr + req_idx * HIDDEN_SIZE + offs_k, high, mask=offs_k < HIDDEN_SIZE)
    if HAS_LOW:
        low = acc - high.to(tl.float32)
        tl.store(
            low_ptr + req_idx * HIDDEN_SIZE + offs_k,
            low.to(low_ptr.dtype.element_ty),
            mask=offs_k < HIDDEN_SIZE,
        )


@triton.jit
def logits_matmul(
    hidden_ptr, low_ptr, weight_ptr, rows, mask_m, offs_v, mask_v,
    HIDDEN_SIZE: tl.constexpr, BLOCK_K: tl.constexpr, HAS_LOW: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """W h, [tokens, rows] float32."""
    acc = tl.zeros([offs_v.shape[0], rows.shape[0]], tl.float32)
    offs_k = tl.arange(0, BLOCK_K)
    weight_ptrs = weight_ptr + offs_v.to(tl.int64)[:, None] * HIDDEN_SIZE
    hidden_offs = rows[:, None] * HIDDEN_SIZE
    for start_k in range(0, HIDDEN_SIZE, BLOCK_K):
        k_idx = start_k + offs_k[None, :]
        weight_mask, hidden_mask = mask_v[:, None], mask_m[:, None]
        if HIDDEN_SIZE % BLOCK_K != 0:
            weight_mask, hidden_mask = (
                weight_mask & (k_idx < HIDDEN_SIZE),
                hidden_mask & (k_idx < HIDDEN_SIZE),
            )
        weight = tl.load(weight_ptrs + k_idx, mask=weight_mask, other=0.0)
        hidden = tl.load(hidden_ptr + hidden_offs + k_idx, mask=hidden_mask, other=0.0)
        if UPCAST:
            weight, hidden = weight.to(tl.float32), hidden.to(tl.float32)
        acc = tl.dot(weight, tl.trans(hidden), acc, input_precision="ieee")
        if HAS_LOW:
            low = tl.load(low_ptr + hidden_offs + k_idx, mask=hidden_mask, other=0.0)
            if UPCAST:
                low = low.to(tl.float32)
            acc = tl.dot(weight, tl.trans(low), acc, input_precision="ieee")
    return acc


@triton.jit
def select_branch(branch_logits, branch_idx, BRANCH_SLOTS: tl.constexpr):
    """Logits of branch `branch_idx` of every request; branch_logits [tokens, requests, slots] → [tokens,
    requests].
    """
    offs_slot = tl.arange(0, BRANCH_SLOTS)[None, None, :]
    return tl.sum(tl.where(offs_slot == branch_idx, branch_logits, 0.0), axis=2)


@triton.jit
def store_branches(
    branch_logits, coef_ptr, rows_out_ptr, coefs_out_ptr, req_idx, row_start, num_rows, offs_v, mask_v,
    vocab_size,
    MIX_BEFORE_HEAD: tl.constexpr, ROWS_STORED: tl.constexpr, BRANCH_SLOTS: tl.constexpr,
):  # fmt: skip
    """Store the first branch, the mix of the others (a single one unscaled), and both coefficients."""
    offs = req_idx[None, :] * (ROWS_STORED * vocab_size) + offs_v[:, None]
    mask = mask_v[:, None] & (num_rows > 0)[None, :]
    mixed = tl.zeros([offs_v.shape[0], req_idx.shape[0]], tl.float32)
    for branch_idx in range(BRANCH_SLOTS):
        logits = select_branch(branch_logits, branch_idx, BRANCH_SLOTS)
        branch_idxs = row_start * 0 + branch_idx
        has_branch = branch_idxs < num_rows
        coef = tl.where(has_branch, 1.0, 0.0)
        if not MIX_BEFORE_HEAD:
            coef = tl.load(coef_ptr + row_start + branch_idx, mask=has_branch, other=0.0)
        is_single = (branch_idxs == 0) | (num_rows == 2)
        coef_out_ptrs = coefs_out_ptr + req_idx * ROWS_STORED + branch_idxs
        tl.store(
            coef_out_ptrs, tl.where(is_single, coef, 1.0), mask=has_branch & (branch_idxs < ROWS_STORED)
        )  # every vocabulary tile stores the same values
        if branch_idx == 0:
            tl.store(rows_out_ptr + offs, logits, mask=mask)
        else:
            mixed += tl.where(is_single, tl.where(has_branch, 1.0, 0.0), coef)[None, :] * logits
    if ROWS_STORED > 1:
        tl.store(rows_out_ptr + offs + vocab_size, mixed, mask=mask & (num_rows > 1)[None, :])


@triton.jit
def mix_branches(
    branch_logits, coef_ptr, strength_ptr, on_ray_ptr, req_idx, row_start, num_rows, offs_v,
    MIX_BEFORE_HEAD: tl.constexpr, BRANCH_SLOTS: tl.constexpr,
):  # fmt: skip
    """Σ c z of every request, [tokens, requests]."""
    scores = tl.zeros([offs_v.shape[0], req_idx.shape[0]], tl.float32)
    for branch_idx in range(BRANCH_SLOTS):
        branch_idxs = row_start * 0 + branch_idx
        has_branch = branch_idxs < num_rows
        coef = tl.where(has_branch, 1.0, 0.0)
        if not MIX_BEFORE_HEAD:
            row = row_start + branch_idxs
            coef = load_coef(coef_ptr, strength_ptr, on_ray_ptr, req_idx, row, branch_idxs, has_branch)
        scores += coef[None, :] * select_branch(branch_logits, branch_idx, BRANCH_SLOTS)
    return scores


@triton.jit
def add_gumbel_noise(scores, steps_ptr, temperature_ptr, seed_ptr, state_row, req_mask, offs_v):
    """Scores/T plus Gumbel noise for sampled requests, unchanged for greedy ones, [tokens, requests]."""
    temperature = tl.load(temperature_ptr + state_row, mask=req_mask, other=0.0)
    is_sampled = temperature >= GREEDY_THRESHOLD
    if tl.max(is_sampled.to(tl.int32), axis=0) > 0:
        seed = tl.load(seed_ptr + state_row, mask=req_mask, other=0)
        position = tl.load(steps_ptr + state_row, mask=req_mask, other=0)
        safe_temperature = tl.where(is_sampled, temperature, 1.0).to(tl.float32)[None, :]
        noise = gumbel_noise(seed[None, :], position[None, :], offs_v[:, None])
        scores = tl.where(is_sampled[None, :], scores / safe_temperature + noise, scores)
    return scores


@triton.jit(do_not_specialize=["valid_vocab", "num_reqs", "num_tiles"])
def lm_head_kernel(
    hidden_ptr, low_ptr, weight_ptr, state_rows_ptr, row_start_ptr, num_rows_ptr,
    coef_ptr, strength_ptr, on_ray_ptr, steps_ptr, temperature_ptr, seed_ptr,
    rows_out_ptr, coefs_out_ptr, row_max_ptr, row_sum_ptr, row_contrast_ptr, base_contrast_ptr,
    score_max_ptr, score_sum_ptr, token_score_ptr, nonfinite_ptr, best_score_ptr, best_token_ptr,
    vocab_size, valid_vocab, num_reqs, num_tiles,
    MIX_BEFORE_HEAD: tl.constexpr, MATERIALIZE: tl.constexpr, BRANCH_LOGPROBS: tl.constexpr,
    RETURN_LOGPROBS: tl.constexpr,
    ROWS_STORED: tl.constexpr, BRANCH_SLOTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_V: tl.constexpr,
    HIDDEN_SIZE: tl.constexpr, BLOCK_K: tl.constexpr, HAS_LOW: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """hidden [rows, HIDDEN_SIZE], with MIX_BEFORE_HEAD one row per request; weight [vocab, HIDDEN_SIZE].

    MATERIALIZE: write rows_out [ROWS_STORED · requests, vocab] and coefs_out; otherwise nonfinite (the number
    of non-finite scores), best_score, best_token and with RETURN_LOGPROBS token_score (the noise-free score
    of the best token), [requests, tiles].
    """
    REQS_PER_TILE: tl.constexpr = BLOCK_M // BRANCH_SLOTS
    tile_idx = tl.program_id(1)
    req_idx = (tl.program_id(0) * REQS_PER_TILE + tl.arange(0, REQS_PER_TILE)).to(tl.int64)
    req_mask = req_idx < num_reqs
    offs_m = tl.arange(0, BLOCK_M)
    req_of_row = (tl.program_id(0) * REQS_PER_TILE + offs_m // BRANCH_SLOTS).to(tl.int64)
    rows, mask_m = req_of_row, req_of_row < num_reqs
    row_start, num_rows = req_idx, req_mask.to(tl.int64)
    if not MIX_BEFORE_HEAD:
        rows = tl.load(row_start_ptr + req_of_row, mask=mask_m, other=0) + offs_m % BRANCH_SLOTS
        mask_m = mask_m & (offs_m % BRANCH_SLOTS < tl.load(num_rows_ptr + req_of_row, mask=mask_m, other=0))
        row_start = tl.load(row_start_ptr + req_idx, mask=req_mask, other=0)
        num_rows = tl.load(num_rows_ptr + req_idx, mask=req_mask, other=0)
    offs_v = tile_idx * BLOCK_V + tl.arange(0, BLOCK_V)
    mask_v = offs_v < vocab_size
    z = logits_matmul(
        hidden_ptr, low_ptr, weight_ptr, rows, mask_m, offs_v, mask_v, HIDDEN_SIZE, BLOCK_K, HAS_LOW, UPCAST
    )
    branch_logits = tl.reshape(z, [BLOCK_V, REQS_PER_TILE, BRANCH_SLOTS])
    if BRANCH_LOGPROBS:
        masked_logits = tl.where(mask_v[:, None], z, float("-inf"))
        max_value = tl.max(masked_logits, axis=0)
        exps = tl.exp(masked_logits - max_value[None, :])
        tl.store(row_max_ptr + rows * num_tiles + tile_idx, max_value, mask=mask_m)
        tl.store(row_sum_ptr + rows * num_tiles + tile_idx, tl.sum(exps, axis=0), mask=mask_m)
        branch_exps = tl.reshape(exps, [BLOCK_V, REQS_PER_TILE, BRANCH_SLOTS])
        contrast = branch_logits - select_branch(branch_logits, 0, BRANCH_SLOTS)[:, :, None]
        of_branch = tl.sum(branch_exps * contrast, axis=0)
        of_base = tl.sum(select_branch(branch_exps, 0, BRANCH_SLOTS)[:, :, None] * contrast, axis=0)
        stats_offs = rows * num_tiles + tile_idx
        tl.store(row_contrast_ptr + stats_offs, tl.reshape(of_branch, [BLOCK_M]), mask=mask_m)
        tl.store(base_contrast_ptr + stats_offs, tl.reshape(of_base, [BLOCK_M]), mask=mask_m)
    if MATERIALIZE:
        store_branches(
            branch_logits, coef_ptr, rows_out_ptr, coefs_out_ptr, req_idx, row_start, num_rows, offs_v,
            mask_v, vocab_size,
            MIX_BEFORE_HEAD, ROWS_STORED, BRANCH_SLOTS,
        )  # fmt: skip
    else:
        scores = mix_branches(
            branch_logits,
            coef_ptr,
            strength_ptr,
            on_ray_ptr,
            req_idx,
            row_start,
            num_rows,
            offs_v,
            MIX_BEFORE_HEAD,
            BRANCH_SLOTS,
        )
        tile_offs = req_idx * num_tiles + tile_idx
        is_finite = tl.abs(scores) < float("inf")
        # count in float32: for a boolean sum the compiler uses local memory
        nonfinite = tl.sum(tl.where(is_finite | (offs_v >= vocab_size)[:, None], 0.0, 1.0), axis=0)
        tl.store(nonfinite_ptr + tile_offs, nonfinite.to(tl.int32), mask=req_mask)
        allowed_scores = tl.where((offs_v < valid_vocab)[:, None] & (scores == scores), scores, float("-inf"))
        state_row = tl.load(state_rows_ptr + req_idx, mask=req_mask, other=0)
        allowed_scores = add_gumbel_noise(
            allowed_scores, steps_ptr, temperature_ptr, seed_ptr, state_row, req_mask, offs_v
        )
        best_score = tl.max(allowed_scores, axis=0)
        best_token = tl.min(
            tl.where(allowed_scores == best_score[None, :], offs_v[:, None], NO_TOKEN), axis=0
        )
        tl.store(best_score_ptr + tile_offs, best_score, mask=req_mask)
        tl.store(best_token_ptr + tile_offs, best_token, mask=req_mask)
        if RETURN_LOGPROBS:
            masked_logits = tl.where(mask_v[:, None], scores, float("-inf"))
            max_value = tl.max(masked_logits, axis=0)
            tl.store(score_max_ptr + tile_offs, max_value, mask=req_mask)
            tl.store(
                score_sum_ptr + tile_offs,
                tl.sum(tl.exp(masked_logits - max_value[None, :]), axis=0),
                mask=req_mask,
            )
            token_score = tl.sum(tl.where(offs_v[:, None] == best_token[None, :], scores, 0.0), axis=0)
            tl.store(token_score_ptr + tile_offs, token_score, mask=req_mask)
