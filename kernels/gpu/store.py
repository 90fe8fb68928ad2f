"""Keys and values to their pages, queries to a tensor of their own, in one launch.

Each program takes one row, all its heads: what is rounded is written once, and nothing is copied besides.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

SPAN = 1024
"""Numbers of a row that a program takes."""


@triton.jit(do_not_specialize=["tokens"])
def store_kernel(
    qkv_ptr,
    cache_ptr,
    page_ptr,
    offset_ptr,
    query_ptr,
    tokens,
    pages,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    SPAN: tl.constexpr,
):
    """pages: how many the cache has; it is [2, pages, KV_HEADS, BLOCK, WIDTH]."""
    row = tl.program_id(0).to(tl.int64)
    number = tl.program_id(1) * SPAN + tl.arange(0, SPAN)
    inside = number < (HEADS + 2 * KV_HEADS) * WIDTH
    x = tl.load(qkv_ptr + row * (HEADS + 2 * KV_HEADS) * WIDTH + number, mask=inside, other=0.0)
    x = x.to(query_ptr.dtype.element_ty)
    head, at = number // WIDTH, number % WIDTH
    tl.store(query_ptr + row * HEADS * WIDTH + number, x, mask=head < HEADS)
    kept = row < tokens
    page = tl.load(page_ptr + row, mask=kept, other=0)
    offset = tl.load(offset_ptr + row, mask=kept, other=0)
    side, of_side = (head - HEADS) // KV_HEADS, (head - HEADS) % KV_HEADS
    place = ((side * pages + page) * KV_HEADS + of_side) * BLOCK + offset
    tl.store(cache_ptr + place * WIDTH + at, x, mask=inside & (head >= HEADS) & kept)


def store(qkv: Tensor, cache: Tensor, page: Tensor, offset: Tensor) -> Tensor:
    """See `kernels.store.store`; qkv and cache contiguous."""
    rows, all_heads, width = qkv.shape
    _, pages, kv_heads, block, _ = cache.shape
    heads = all_heads - 2 * kv_heads
    queries = torch.empty(rows, heads, width, dtype=cache.dtype, device=cache.device)
    store_kernel[(rows, triton.cdiv(all_heads * width, SPAN))](
        qkv, cache, page, offset, queries, len(page), pages,
        HEADS=heads, KV_HEADS=kv_heads, WIDTH=width, BLOCK=block, SPAN=SPAN,
    )  # fmt: skip
    return queries
