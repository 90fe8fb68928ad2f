"""Masks of the vocabulary in Triton, see `kernels.steering.masks`."""

from __future__ import annotations

import triton
import triton.language as tl

from ...steering.trust_region import FORBIDDEN_LOGIT as REFERENCE_FORBIDDEN_LOGIT
from .columns import column, load_param

MASK_TOP_P = column("mask_top_p")
FORBIDDEN_LOGIT = tl.constexpr(REFERENCE_FORBIDDEN_LOGIT)


@triton.jit
def forbidden_in_trust_region(
    logits_ptr, coef_ptr, row_valid_max_ptr, params_ptr, state_row, row_start, num_rows, scale,
    base_share, offs_v, mask_v, vocab_size, num_splits, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Tokens of a split that have no part in the divergence of a trust region, [BLOCK_V] bool."""
    forbidden = offs_v < 0
    return forbidden


@triton.jit
def outside_nucleus(
    logits_ptr, nucleus_threshold_ptr, params_ptr, state_row, req_idx, row_start, num_rows, offs_v, mask_v,
    vocab_size,
):  # fmt: skip
    """Tokens of a split outside the nucleus of the last branch, [BLOCK_V] bool."""
    forbidden = offs_v < 0
    if load_param(params_ptr, state_row, MASK_TOP_P) < 1:
        threshold = tl.load(nucleus_threshold_ptr + req_idx)
        last_row = row_start + num_rows - 1
        z = tl.load(logits_ptr + last_row * vocab_size + offs_v, mask=mask_v, other=0.0)
        forbidden = ~(z.to(tl.float32) >= threshold)
    return forbidden
