"""The turning of a step's heads in one launch: x · cos + swap(x) · sin, as `kernels.rope.rotate`."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

SPAN = 1024
"""Numbers of a row that a program takes."""


@triton.jit
def rotate_kernel(x_ptr, cos_ptr, sin_ptr, out_ptr, numbers, WIDTH: tl.constexpr, SPAN: tl.constexpr):
    """numbers: those of a row, all heads of a token."""
    row = tl.program_id(0).to(tl.int64) * numbers
    number = tl.program_id(1) * SPAN + tl.arange(0, SPAN)
    inside = number < numbers
    at = number % WIDTH
    other = number - at + (at + WIDTH // 2) % WIDTH
    x = tl.load(x_ptr + row + number, mask=inside, other=0.0).to(tl.float32)
    swapped = tl.load(x_ptr + row + other, mask=inside, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + row + number, mask=inside, other=0.0)
    sin = tl.load(sin_ptr + row + number, mask=inside, other=0.0)
    tl.store(out_ptr + row + number, x * cos + swapped * sin, mask=inside)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [tokens, heads, head_dim], cos and sin the same in float32 → float32; all contiguous."""
    tokens, heads, width = x.shape
    out = torch.empty_like(cos)
    grid = (tokens, triton.cdiv(heads * width, SPAN))
    rotate_kernel[grid](x, cos, sin, out, heads * width, WIDTH=width, SPAN=SPAN)
    return out
