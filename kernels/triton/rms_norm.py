"""RMSNorm, one program per row. The preceding matmul has already added the residual."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_HIDDEN_SIZE = 16_384
"""Largest row that a program holds in registers."""


@triton.jit
def rms_norm_kernel(x_ptr, weight_ptr, eps_ptr, out_ptr, hidden_size, BLOCK_N: tl.constexpr):
    row_start = tl.program_id(0).to(tl.int64) * hidden_size
    offs_n = tl.arange(0, BLOCK_N)
    mask_n = offs_n < hidden_size
    x = tl.load(x_ptr + row_start + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    rstd = tl.rsqrt(tl.sum(x * x, axis=0) / hidden_size + tl.load(eps_ptr))
    weight = tl.load(weight_ptr + offs_n, mask=mask_n, other=0.0)
    tl.store(out_ptr + row_start + offs_n, x * rstd * weight, mask=mask_n)


def rms_norm(x: Tensor, weight: Tensor, eps: Tensor) -> Tensor:
    """See `kernels.reference.rms_norm.rms_norm`; x [rows, hidden]. Raises ValueError for longer rows."""
    num_rows, hidden_size = x.shape
    if hidden_size > MAX_HIDDEN_SIZE:
        raise ValueError(f"hidden size must be at most {MAX_HIDDEN_SIZE}, got {hidden_size}")
    x, block_n = x.contiguous(), triton.next_power_of_2(hidden_size)
    out = torch.empty_like(x)
    num_warps = min(max(block_n // 512, 1), 16)
    rms_norm_kernel[(num_rows,)](x, weight, eps, out, hidden_size, BLOCK_N=block_n, num_warps=num_warps)
    return out
