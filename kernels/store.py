"""A step's keys and values go to their pages, and its queries to where attention reads them."""

from __future__ import annotations

from torch import Tensor


def store(qkv: Tensor, cache: Tensor, page: Tensor, offset: Tensor) -> Tensor:
    """qkv [rows, heads + 2 · kv_heads, head_dim], turned and scaled; cache [2, pages, kv_heads, block_size,
    head_dim], keys then values; page, offset [tokens ≤ rows] int64: the place of each row's token in it, rows
    beyond them having none → queries [rows, heads, head_dim] in the cache's type."""
    kv_heads, tokens = cache.shape[2], len(page)
    held = qkv.to(cache.dtype)
    heads = held.shape[1] - 2 * kv_heads
    for side, part in enumerate(held[:tokens, heads:].split(kv_heads, 1)):
        cache[side, page, :, offset] = part
    return held[:, :heads].contiguous()
