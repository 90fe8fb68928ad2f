"""Mix the logits of a request's branches in one pass, in splits of the vocabulary.

The kernel loops over the rows and keeps the split in registers, so that neither the number of rows nor that
of other requests changes the arithmetic. Each split stores (max, Σ exp) per row, for E_k and P_k of
`kernels.steering.gains` also Σ exp(z_k) (z_k − z_0) and Σ exp(z_0) (z_k − z_0), the mixed logits, OPAD's
contrast for the next step, whether any value was not finite, and in a trust region the moments at the coarse
strengths.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .columns import column, load_param
from .masks import FORBIDDEN_LOGIT
from .trust_region import KL_BUDGET, coarse_strength, store_moments

PREV_CONTRAST_COEF = column("prev_contrast_coef")


@triton.jit
def has_nonfinite(values, mask):
    """1 if any entry is NaN or infinite, else 0; 0 · x is NaN exactly for those."""
    check = tl.sum(tl.where(mask, values, 0.0) * 0.0, axis=0)
    return (check != check).to(tl.int32)


@triton.jit(do_not_specialize=["params_stride", "num_splits", "valid_vocab"])
def mix_logits_kernel(
    logits_ptr, state_rows_ptr, row_start_ptr, num_rows_ptr, coef_ptr, strength_ptr, steps_ptr,
    params_ptr, params_stride,
    contrast_slot_ptr, prev_contrast_ptr, mixed_logits_ptr, row_max_ptr, row_sum_ptr, row_contrast_ptr,
    base_contrast_ptr,
    row_valid_max_ptr, nonfinite_ptr,
    centre_ptr, coarse_sums_ptr, vocab_size, num_splits, valid_vocab,
    HAS_PREV_CONTRAST: tl.constexpr, STORE_COARSE_SUMS: tl.constexpr,
    NUM_COARSE: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """valid_vocab: ids from it on are never chosen; row_valid_max: the maximum of each row below it."""
    req_idx, split_idx = tl.program_id(0).to(tl.int64), tl.program_id(1)
    state_row = tl.load(state_rows_ptr + req_idx)
    row_start, num_rows = tl.load(row_start_ptr + req_idx), tl.load(num_rows_ptr + req_idx)
    offs_v = split_idx * BLOCK_V + tl.arange(0, BLOCK_V)
    mask_v = offs_v < vocab_size
    mixed = tl.zeros([BLOCK_V], tl.float32)
    centre = tl.zeros([], tl.float32)
    first_z, first_exps = mixed, mixed
    for branch_idx in range(num_rows):
        row = row_start + branch_idx
        z = tl.load(logits_ptr + row * vocab_size + offs_v, mask=mask_v, other=FORBIDDEN_LOGIT).to(tl.float32)
        coef = tl.load(coef_ptr + row)
        mixed += coef * z
        centre += coef * tl.load(logits_ptr + row * vocab_size).to(tl.float32)
        row_max = tl.max(z, axis=0)
        tl.store(row_max_ptr + row * num_splits + split_idx, row_max)
        exps = tl.exp(z - row_max)
        tl.store(row_sum_ptr + row * num_splits + split_idx, tl.sum(exps, axis=0))
        if branch_idx == 0:
            first_z, first_exps = z, exps
        else:
            contrast, stats_offs = z - first_z, row * num_splits + split_idx
            tl.store(row_contrast_ptr + stats_offs, tl.sum(exps * contrast, axis=0))
            tl.store(base_contrast_ptr + stats_offs, tl.sum(first_exps * contrast, axis=0))
        row_valid_max = row_max
        if (split_idx + 1) * BLOCK_V > valid_vocab:
            row_valid_max = tl.max(tl.where(offs_v < valid_vocab, z, float("-inf")), axis=0)
        tl.store(row_valid_max_ptr + row * num_splits + split_idx, row_valid_max)
    # a non-finite value of any row makes the mix non-finite, even with coefficient 0
    tl.store(nonfinite_ptr + req_idx * num_splits + split_idx, has_nonfinite(mixed, mask_v))
    if HAS_PREV_CONTRAST:
        prev_contrast_coef = load_param(params_ptr, params_stride, state_row, PREV_CONTRAST_COEF)
        if prev_contrast_coef != 0:
            z0 = tl.load(logits_ptr + row_start * vocab_size + offs_v, mask=mask_v, other=0.0).to(tl.float32)
            z1 = tl.load(logits_ptr + (row_start + 1) * vocab_size + offs_v, mask=mask_v, other=0.0).to(
                tl.float32
            )
            contrast_ptrs = prev_contrast_ptr + tl.load(contrast_slot_ptr + state_row) * vocab_size + offs_v
            has_prev = tl.load(steps_ptr + state_row) > 0
            mixed += tl.where(
                has_prev,
                prev_contrast_coef.to(tl.float32) * tl.load(contrast_ptrs, mask=mask_v, other=0.0),
                0.0,
            )
            tl.debug_barrier()  # read the previous contrast before it is overwritten
            tl.store(contrast_ptrs, z1 - z0, mask=mask_v)
    tl.store(mixed_logits_ptr + req_idx * vocab_size + offs_v, mixed, mask=mask_v)
    centre -= tl.load(logits_ptr + row_start * vocab_size).to(tl.float32)
    tl.store(centre_ptr + req_idx, centre, mask=split_idx == 0)
    if STORE_COARSE_SUMS:
        if load_param(params_ptr, params_stride, state_row, KL_BUDGET) < float("inf"):
            max_strength = tl.load(strength_ptr + req_idx).to(tl.float32)
            base = tl.load(logits_ptr + row_start * vocab_size + offs_v, mask=mask_v, other=float("-inf")).to(
                tl.float32
            )
            direction = tl.where(mask_v, mixed - base - centre, 0.0)
            sums_ptr = coarse_sums_ptr + req_idx * 4 * NUM_COARSE * num_splits
            for point_idx in range(NUM_COARSE):
                a = coarse_strength(split_idx * 0 + point_idx, max_strength)
                store_moments(sums_ptr, point_idx, base, direction, a, split_idx, num_splits, NUM_COARSE)
