"""Addition of a residual and root-mean-square normalisation, a row a program, in one pass over it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

LONGEST = 16_384
"""Numbers of a row that a program holds in registers."""


@triton.jit
def norm_kernel(
    x_ptr,
    added_ptr,
    weight_ptr,
    eps_ptr,
    total_ptr,
    out_ptr,
    hidden,
    ADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * hidden
    at = tl.arange(0, BLOCK)
    inside = at < hidden
    x = tl.load(x_ptr + row + at, mask=inside, other=0.0).to(tl.float32)
    if ADDED:
        x += tl.load(added_ptr + row + at, mask=inside, other=0.0).to(tl.float32)
        kept = x.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + row + at, kept, mask=inside)
        x = kept.to(tl.float32)  # what the next layer adds to is what is normalised here
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / hidden + tl.load(eps_ptr))
    weight = tl.load(weight_ptr + at, mask=inside, other=0.0)
    tl.store(out_ptr + row + at, x * scale * weight, mask=inside)


def add_rms_norm(x: Tensor, added: Tensor | None, weight: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    """(x + added, its norm); see `kernels.norm.add_rms_norm`. Raises ValueError for too long a row."""
    hidden = x.shape[-1]
    if hidden > LONGEST:
        raise ValueError(f"a row has {hidden} numbers; at most {LONGEST} are normalised")
    rows, block = x.numel() // hidden, triton.next_power_of_2(hidden)
    out = torch.empty_like(x)
    total = x if added is None else torch.empty_like(x)
    norm_kernel[(rows,)](
        x,
        x if added is None else added,
        weight,
        eps,
        total,
        out,
        hidden,
        ADDED=added is not None,
        BLOCK=block,
        num_warps=min(max(block // 512, 1), 16),
    )
    return total, out
