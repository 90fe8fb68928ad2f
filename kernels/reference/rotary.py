"""Rotary position embedding in the half-split layout: (x1, x2) → (x1 cos − x2 sin, x2 cos + x1 sin)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor
from torch.nn import functional

from .rms_norm import rms_norm


@dataclass(frozen=True)
class HeadNorm:
    """The norm of a layer's queries and keys: weight [queries + kv_heads, head_dim], eps [1], float32."""

    weight: Tensor
    eps: Tensor


@dataclass(frozen=True)
class Turns:
    """How the heads of a step are turned, in every layer alike.

    cos, sin [rows, head_dim] float32, sin with the sign of its half, see `rotate`. queries, kv_heads: how
    many heads of each there are. scale: what queries are multiplied by.
    """

    cos: Tensor
    sin: Tensor
    queries: int
    kv_heads: int
    scale: float

    @cached_property
    def by_head(self) -> tuple[Tensor, Tensor]:
        """cos and sin of every head, [rows, queries + 2 · kv_heads, head_dim]: of queries scaled, so that one
        rotation does both, and of values, which are not turned, 1 and 0."""
        return self._spread(self.cos, 1.0), self._spread(self.sin, 0.0)

    def _spread(self, turn: Tensor, plain: float) -> Tensor:
        turned = turn[:, None].expand(-1, self.queries + self.kv_heads, -1)
        found = functional.pad(turned, (0, 0, 0, self.kv_heads), value=plain)
        found.narrow(1, 0, self.queries).mul_(self.scale)
        return found


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x, cos, sin [rows, heads, head_dim]; sin has the sign of its half, see
    `models.layers.rotary_embedding`: the rotation is
    x · cos + swap(x) · sin, in the type of cos. A head with cos 1 and sin 0 stays as it is."""
    wide = x.to(cos.dtype)  # once: each operation on two types would cast for itself
    swapped = wide.roll(x.shape[-1] // 2, -1)
    # in the memory that there is: three more copies of a prompt's heads would not stay in a cache
    turned = wide * cos if wide is x else wide.mul_(cos)
    return turned.addcmul_(swapped, sin)


def rope_write(
    qkv: Tensor, turns: Turns, norm: HeadNorm | None, cache: Tensor, page: Tensor, offset: Tensor
) -> Tensor:
    """Norm and rotation of queries and keys; keys and values go into the cache.

    qkv [rows, queries + 2 · kv_heads, head_dim]; cache [2, pages, kv_heads, block_size, head_dim], keys then
    values; page, offset [tokens ≤ rows] int64: the place of each row's token in it, rows beyond them having
    none → the turned and scaled queries [rows, queries, head_dim] in the cache's type.
    """
    tokens, kv_heads = len(page), turns.kv_heads
    wide = qkv.to(turns.cos.dtype)
    turned, values = wide[:, :-kv_heads], wide[:tokens, -kv_heads:]
    if norm is not None:
        turned = rms_norm(turned, norm.weight, norm.eps)
    turned = rotate(turned, turns.cos[:, None], turns.sin[:, None])
    cache[0, page, :, offset] = turned[:tokens, turns.queries :].to(cache.dtype)
    cache[1, page, :, offset] = values.to(cache.dtype)
    return (turned[:, : turns.queries] * turns.scale).to(cache.dtype)
