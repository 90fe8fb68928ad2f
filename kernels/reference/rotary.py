"""Reference RoPE in the half-split layout: (x1, x2) → (x1 cos − x2 sin, x2 cos + x1 sin)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch import Tensor
from torch.nn import functional

from .rms_norm import rms_norm


@dataclass(frozen=True)
class QKNorm:
    """QK norm of a layer: weight [heads + kv_heads, head_dim], eps [1], float32."""

    weight: Tensor
    eps: Tensor


@dataclass(frozen=True)
class RotaryCosSin:
    """RoPE factors of a step's rows, the same in every layer.

    cos, sin [rows, head_dim] float32; sin carries the sign of its half, see `apply_rotary`. num_heads: number
    of query heads. q_scale: queries are multiplied by it.
    """

    cos: Tensor
    sin: Tensor
    num_heads: int
    num_kv_heads: int
    q_scale: float

    @cached_property
    def per_head(self) -> tuple[Tensor, Tensor]:
        """cos and sin of every head, [rows, heads + 2 · kv_heads, head_dim]: scaled for queries, so that the
        rotation also scales them; 1 and 0 for values, which are not rotated."""
        return self._expand(self.cos, 1.0), self._expand(self.sin, 0.0)

    def _expand(self, factor: Tensor, v_fill: float) -> Tensor:
        qk_factor = factor[:, None].expand(-1, self.num_heads + self.num_kv_heads, -1)
        padded = functional.pad(qk_factor, (0, 0, 0, self.num_kv_heads), value=v_fill)
        padded.narrow(1, 0, self.num_heads).mul_(self.q_scale)
        return padded


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x · cos + swap(x) · sin in the dtype of cos, for x, cos, sin [rows, heads, head_dim].

    swap exchanges the halves; sin carries the sign of its half, see `models.layers.rotary_embedding`. cos 1
    and sin 0 leave a head unchanged. May overwrite the converted copy of x, not x.
    """
    x_acc = x.to(cos.dtype)  # once: each operation with mixed dtypes would convert again
    rolled = x_acc.roll(x.shape[-1] // 2, -1)
    # in place: three more copies of a prompt's heads would not fit in the CPU's cache
    out = x_acc * cos if x_acc is x else x_acc.mul_(cos)
    return out.addcmul_(rolled, sin)


def rope_and_write_kv(
    qkv: Tensor,
    rotary: RotaryCosSin,
    norm: QKNorm | None,
    kv_cache: Tensor,
    block_ids: Tensor,
    block_offsets: Tensor,
) -> Tensor:
    """Apply QK norm and RoPE, and write keys and values to the cache.

    qkv [rows, heads + 2 · kv_heads, head_dim]; kv_cache [2, num_blocks, kv_heads, block_size, head_dim], keys
    then values; block_ids, block_offsets [tokens ≤ rows] int64: cache slots of the first rows; later rows are
    not written → rotated and scaled queries [rows, heads, head_dim] in the cache's dtype.
    """
    num_tokens, num_kv_heads = len(block_ids), rotary.num_kv_heads
    qkv_acc = qkv.to(rotary.cos.dtype)
    qk, v = qkv_acc[:, :-num_kv_heads], qkv_acc[:num_tokens, -num_kv_heads:]
    if norm is not None:
        qk = rms_norm(qk, norm.weight, norm.eps)
    qk = apply_rotary(qk, rotary.cos[:, None], rotary.sin[:, None])
    kv_cache[0, block_ids, :, block_offsets] = qk[:num_tokens, rotary.num_heads :].to(kv_cache.dtype)
    kv_cache[1, block_ids, :, block_offsets] = v.to(kv_cache.dtype)
    return (qk[:, : rotary.num_heads] * rotary.q_scale).to(kv_cache.dtype)
