"""Keys and values to their pages, queries to a tensor of their own: one launch over all numbers of a step."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

SPAN = 1024
"""Numbers that a program takes, of any rows."""


@triton.jit(do_not_specialize=["tokens", "pages"])
def store_kernel(
    qkv_ptr,
    cache_ptr,
    page_ptr,
    offset_ptr,
    query_ptr,
    numbers,
    tokens,
    pages,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    SPAN: tl.constexpr,
):
    """numbers: of all rows together. pages: how many the cache has, [2, pages, KV_HEADS, BLOCK, WIDTH]."""
    number = tl.program_id(0).to(tl.int64) * SPAN + tl.arange(0, SPAN)
    inside = number < numbers
    x = tl.load(qkv_ptr + number, mask=inside, other=0.0).to(query_ptr.dtype.element_ty)
    row, of_row = number // ((HEADS + 2 * KV_HEADS) * WIDTH), number % ((HEADS + 2 * KV_HEADS) * WIDTH)
    head, at = of_row // WIDTH, of_row % WIDTH
    tl.store(query_ptr + row * HEADS * WIDTH + of_row, x, mask=inside & (head < HEADS))
    kept = inside & (head >= HEADS) & (row < tokens)
    page = tl.load(page_ptr + row, mask=kept, other=0)
    offset = tl.load(offset_ptr + row, mask=kept, other=0)
    side, of_side = (head - HEADS) // KV_HEADS, (head - HEADS) % KV_HEADS
    place = ((side * pages + page) * KV_HEADS + of_side) * BLOCK + offset
    tl.store(cache_ptr + place * WIDTH + at, x, mask=kept)


def store(qkv: Tensor, cache: Tensor, page: Tensor, offset: Tensor) -> Tensor:
    """See `kernels.store.store`; qkv and cache contiguous."""
    rows, all_heads, width = qkv.shape
    _, pages, kv_heads, block, _ = cache.shape
    heads = all_heads - 2 * kv_heads
    queries = torch.empty(rows, heads, width, dtype=cache.dtype, device=cache.device)
    store_kernel[(triton.cdiv(qkv.numel(), SPAN),)](
        qkv, cache, page, offset, queries, qkv.numel(), len(page), pages,
        HEADS=heads, KV_HEADS=kv_heads, WIDTH=width, BLOCK=block, SPAN=SPAN,
    )  # fmt: skip
    return queries
