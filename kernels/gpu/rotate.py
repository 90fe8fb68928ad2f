"""The turning of a step's heads in one launch: x · cos + swap(x) · sin, as `kernels.rope.rotate`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

SPAN = 1024
"""Numbers that a program takes, of any rows."""


@triton.jit
def rotate_kernel(x_ptr, cos_ptr, sin_ptr, out_ptr, numbers, WIDTH: tl.constexpr, SPAN: tl.constexpr):
    """numbers: of all rows together."""
    number = tl.program_id(0).to(tl.int64) * SPAN + tl.arange(0, SPAN)
    inside = number < numbers
    at = number % WIDTH
    other = number - at + (at + WIDTH // 2) % WIDTH
    x = tl.load(x_ptr + number, mask=inside, other=0.0).to(tl.float32)
    swapped = tl.load(x_ptr + other, mask=inside, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + number, mask=inside, other=0.0)
    sin = tl.load(sin_ptr + number, mask=inside, other=0.0)
    tl.store(out_ptr + number, x * cos + swapped * sin, mask=inside)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [tokens, heads, head_dim], cos and sin the same in float32 → float32; all contiguous."""
    out = torch.empty_like(cos)
    rotate_kernel[(triton.cdiv(x.numel(), SPAN),)](x, cos, sin, out, x.numel(), WIDTH=x.shape[-1], SPAN=SPAN)
    return out
