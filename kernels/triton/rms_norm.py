"""Root-mean-square normalisation, a row a program. The residual was added by the product before."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LONGEST = 16_384
"""Numbers of a row that a program holds in registers."""


@triton.jit
def norm_kernel(x_ptr, weight_ptr, eps_ptr, out_ptr, hidden, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * hidden
    at = tl.arange(0, BLOCK)
    inside = at < hidden
    x = tl.load(x_ptr + row + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / hidden + tl.load(eps_ptr))
    weight = tl.load(weight_ptr + at, mask=inside, other=0.0)
    tl.store(out_ptr + row + at, x * scale * weight, mask=inside)


def rms_norm(x: Tensor, weight: Tensor, eps: Tensor) -> Tensor:
    """See `kernels.reference.rms_norm.rms_norm`, of whole rows [rows, hidden]. Raises ValueError for too
    long ones.
    """
    rows, hidden = x.shape
    if hidden > LONGEST:
        raise ValueError(f"a row has {hidden} numbers; at most {LONGEST} are normalised")
    x, block = x.contiguous(), triton.next_power_of_2(hidden)
    out = torch.empty_like(x)
    warps = min(max(block // 512, 1), 16)
    norm_kernel[(rows,)](x, weight, eps, out, hidden, BLOCK=block, num_warps=warps)
    return out
