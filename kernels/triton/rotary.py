"""What stands between the projection of queries, keys and values and attention, in one launch.

Each program takes one head of one token: its norm where the model has one, its rotation unless it is a value,
and then its place: queries lie in a new tensor, keys and values in their pages.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from ..reference.rotary import HeadNorm, Turns


@triton.jit(do_not_specialize=["tokens", "pages"])
def rope_kernel(
    qkv_ptr, cos_ptr, sin_ptr, norm_ptr, eps_ptr, page_ptr, offset_ptr, query_ptr, cache_ptr,
    tokens, pages, scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
    BLOCK: tl.constexpr, NORMED: tl.constexpr,
):  # fmt: skip
    """tokens: rows beyond have no place. The cache is [2, pages, KV_HEADS, BLOCK, WIDTH]."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = tl.arange(0, PADDED)
    inside = at < WIDTH
    swapped = (at + WIDTH // 2) % WIDTH
    row = qkv_ptr + (token * (HEADS + 2 * KV_HEADS) + head) * WIDTH
    x = tl.load(row + at, mask=inside, other=0.0).to(tl.float32)
    if head < HEADS + KV_HEADS:
        other = tl.load(row + swapped, mask=inside, other=0.0).to(tl.float32)
        if NORMED:
            length = tl.rsqrt(tl.sum(x * x, axis=0) / WIDTH + tl.load(eps_ptr))
            x *= length * tl.load(norm_ptr + head * WIDTH + at, mask=inside, other=0.0)
            other *= length * tl.load(norm_ptr + head * WIDTH + swapped, mask=inside, other=0.0)
        cos = tl.load(cos_ptr + token * WIDTH + at, mask=inside, other=0.0)
        sin = tl.load(sin_ptr + token * WIDTH + at, mask=inside, other=0.0)
        x = x * cos + other * sin
    if head < HEADS:
        tl.store(query_ptr + (token * HEADS + head) * WIDTH + at, x * scale, mask=inside)
    elif token < tokens:
        side, of_side = (head - HEADS) // KV_HEADS, (head - HEADS) % KV_HEADS
        page = side * pages + tl.load(page_ptr + token)
        place = ((page * KV_HEADS + of_side) * BLOCK + tl.load(offset_ptr + token)) * WIDTH
        tl.store(cache_ptr + place + at, x, mask=inside)


def rope_write(
    qkv: Tensor, turns: Turns, norm: HeadNorm | None, cache: Tensor, page: Tensor, offset: Tensor
) -> Tensor:
    """Turned queries; keys and values go into the cache. All contiguous. See
    `kernels.reference.rotary.rope_write`.
    """
    rows, all_heads, width = qkv.shape
    _, pages, kv_heads, block, _ = cache.shape
    queries = torch.empty(rows, turns.queries, width, dtype=cache.dtype, device=cache.device)
    weight, eps = (norm.weight, norm.eps) if norm else (turns.cos, turns.cos)
    rope_kernel[(rows, all_heads)](
        qkv, turns.cos, turns.sin, weight, eps, page, offset, queries, cache, len(page), pages, turns.scale,
        HEADS=turns.queries, KV_HEADS=kv_heads, WIDTH=width, PADDED=triton.next_power_of_2(width),
        BLOCK=block, NORMED=norm is not None, num_warps=1,
    )  # fmt: skip
    return queries
