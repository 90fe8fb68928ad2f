"""Rotary position embedding in the half-split layout: (x1, x2) → (x1 cos − x2 sin, x2 cos + x1 sin)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .norm import rms_norm


@dataclass(frozen=True)
class Heads:
    """How a layer's heads are made ready for attention.

    queries: how many there are. scale: what they are multiplied by. norm [queries + kv_heads, head_dim] and
    eps [1] float32: of queries and keys, in models that have one.
    """

    queries: int
    scale: float
    norm: Tensor | None = None
    eps: Tensor | None = None


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x, cos, sin [tokens, heads, head_dim]; sin has the sign of its half, see `models.rope`: the rotation is
    x · cos + swap(x) · sin, in the type of cos. A head with cos 1 and sin 0 stays as it is."""
    x = x.to(cos.dtype)  # once: each operation on two types would cast for itself
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)


def rope_write(
    qkv: Tensor, cos: Tensor, sin: Tensor, cache: Tensor, page: Tensor, offset: Tensor, heads: Heads
) -> Tensor:
    """Norm and rotation of queries and keys; keys and values go into the cache.

    qkv [tokens, queries + 2 · kv_heads, head_dim]; cos, sin [tokens, head_dim] float32, sin with the sign of
    its half; cache [2, pages, kv_heads, block_size, head_dim], keys then values; page, offset [tokens] int64:
    each token's place in it → the turned and scaled queries [tokens, queries, head_dim] in qkv's type.
    """
    kv_heads = cache.shape[2]
    wide = qkv.float()
    turned, values = wide[:, :-kv_heads], wide[:, -kv_heads:]
    if heads.norm is not None and heads.eps is not None:
        turned = rms_norm(turned, heads.norm, heads.eps)
    turned = rotate(turned, cos[:, None], sin[:, None])
    cache[0, page, :, offset] = turned[:, heads.queries :].to(cache.dtype)
    cache[1, page, :, offset] = values.to(cache.dtype)
    return (turned[:, : heads.queries] * heads.scale).to(qkv.dtype)
