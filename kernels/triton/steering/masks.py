"""Masks of the vocabulary in Triton, see `kernels.steering.masks`."""

from __future__ import annotations

import triton
import triton.language as tl

from ...steering.trust_region import FORBIDDEN_LOGIT as REFERENCE_FORBIDDEN_LOGIT
from .columns import column, load_param

MASK_TOP_P, RELATIVE_TOP = column("mask_top_p"), column("relative_top")
FORBIDDEN_LOGIT = tl.constexpr(REFERENCE_FORBIDDEN_LOGIT)


@triton.jit
def below_relative_top(
    logits_ptr, coef_ptr, row_valid_max_ptr, row_start, num_rows, scale, base_share, relative_top,
    offs_v, mask_v, vocab_size, num_splits, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Tokens of a split less likely than `relative_top` times the likeliest in each branch with a positive
    coefficient, [BLOCK_V] bool. A branch's coefficient is `scale` times its entry of
    coef_ptr; base_share is added to that of the first.
    """
    offs_s = tl.arange(0, BLOCK_S)
    log_relative_top = tl.log(relative_top)
    forbidden = offs_v >= 0
    any_positive = row_start < 0
    for branch_idx in range(num_rows):
        row = row_start + branch_idx
        coef = scale * tl.load(coef_ptr + row) + tl.where(branch_idx == 0, base_share, 0.0)
        if coef > 0:
            any_positive = row_start >= 0
            maxes = tl.load(
                row_valid_max_ptr + row * num_splits + offs_s, mask=offs_s < num_splits, other=float("-inf")
            )
            floor = tl.max(maxes, axis=0) + log_relative_top
            z = tl.load(logits_ptr + row * vocab_size + offs_v, mask=mask_v, other=float("-inf"))
            forbidden = forbidden & (z.to(tl.float32) < floor)
    return forbidden & any_positive


@triton.jit
def forbidden_in_trust_region(
    logits_ptr, coef_ptr, row_valid_max_ptr, params_ptr, params_stride, state_row, row_start, num_rows, scale,
    base_share, offs_v, mask_v, vocab_size, num_splits, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Tokens of a split that have no part in the divergence of a trust region, [BLOCK_V] bool."""
    forbidden = offs_v < 0
    relative_top = load_param(params_ptr, params_stride, state_row, RELATIVE_TOP).to(tl.float32)
    if relative_top > 0:
        forbidden = below_relative_top(
            logits_ptr, coef_ptr, row_valid_max_ptr, row_start, num_rows, scale, base_share, relative_top,
            offs_v, mask_v, vocab_size, num_splits, BLOCK_S,
        )  # fmt: skip
    return forbidden


@triton.jit
def outside_nucleus(
    logits_ptr, nucleus_threshold_ptr, params_ptr, params_stride,
    state_row, req_idx, row_start, num_rows, offs_v, mask_v,
    vocab_size,
):  # fmt: skip
    """Tokens of a split outside the nucleus of the last branch, [BLOCK_V] bool."""
    forbidden = offs_v < 0
    if load_param(params_ptr, params_stride, state_row, MASK_TOP_P) < 1:
        threshold = tl.load(nucleus_threshold_ptr + req_idx)
        last_row = row_start + num_rows - 1
        z = tl.load(logits_ptr + last_row * vocab_size + offs_v, mask=mask_v, other=0.0)
        forbidden = ~(z.to(tl.float32) >= threshold)
    return forbidden
