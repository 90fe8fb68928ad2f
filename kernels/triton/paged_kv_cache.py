"""Paged KV caches that use the Triton attention and RoPE kernels."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..common.profiling import in_stage
from ..reference.paged_kv_cache import AttentionMetadata, PagedKVCache
from .attention import paged_attention
from .batch_invariant_attention import invariant_attention
from .rotary import rope_and_write_kv

if TYPE_CHECKING:
    from torch import Tensor

    from ..attention_params import AttentionParams
    from ..reference.rotary import QKNorm, RotaryCosSin


class TritonPagedKVCache(PagedKVCache):
    """`PagedKVCache` with Triton kernels, without host synchronisation."""

    attention_fn = staticmethod(paged_attention)

    @in_stage("rope")
    def apply_rope(
        self,
        metadata: AttentionMetadata,
        kv_cache: Tensor,
        qkv: Tensor,
        cos_sin: RotaryCosSin,
        qk_norm: QKNorm | None,
    ) -> Tensor:
        return rope_and_write_kv(
            qkv.contiguous(), cos_sin, qk_norm, kv_cache, metadata.block_ids, metadata.block_offsets
        )

    def run_attention(
        self, metadata: AttentionMetadata, kv_cache: Tensor, queries: Tensor, params: AttentionParams
    ) -> Tensor:
        out = torch.empty_like(queries)
        out[len(metadata.block_ids) :] = 0  # padding rows have no tile
        for tiles in metadata.query_tiles:
            self.attention_fn(queries, kv_cache, metadata.block_tables, tiles, params, out)
        return out


class BatchInvariantPagedKVCache(TritonPagedKVCache):
    """Like `TritonPagedKVCache`; results depend bitwise neither on the other tokens of a step nor on how a
    prompt was chunked.
    """

    attention_fn = staticmethod(invariant_attention)
