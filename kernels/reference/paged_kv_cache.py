"""Reference paged KV cache in plain torch, for any device, and its attention metadata."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..attention_metadata import swap_blocks
from ..attention_params import CAUSAL, AttentionParams
from ..common.profiling import in_stage
from ..common.transfer import to_device
from .paged_attention import QueryTiles, max_seq_len, paged_attention, split_tiles
from .rotary import rope_and_write_kv

if TYPE_CHECKING:
    from ..attention_metadata import RaggedBatch, SequenceChunk
    from .rotary import QKNorm, RotaryCosSin

PREFILL_TILE = 16
"""Query tokens per tile of a prompt."""


@dataclass(frozen=True)
class AttentionMetadata:
    """Cache slots, block tables and query tiles of a step.

    block_ids, block_offsets [tokens] int64: each token's slot. block_tables [branches, max_blocks] int32:
    block ids in order. query_tiles: decode tiles and prompt tiles, see `QueryTiles`.
    """

    block_ids: Tensor
    block_offsets: Tensor
    block_tables: Tensor
    query_tiles: tuple[QueryTiles, ...]

    @classmethod
    def from_batch(cls, batch: RaggedBatch, device: torch.device) -> AttentionMetadata:
        """Build the metadata of a step of any kind, with one copy to the device."""
        spans_by_size = [
            (tile_size, spans) for tile_size, spans in _spans_by_tile_size(batch.chunks).items() if spans
        ]
        tile_columns = [split_tiles(spans, size) for size, spans in spans_by_size]
        block_tables, *columns = to_device(
            device,
            _stack_block_tables(batch.chunks),
            *(column for tile_column in tile_columns for column in tile_column),
        )
        query_tiles = []
        for index, ((size, _), tiles) in enumerate(zip(spans_by_size, tile_columns, strict=True)):
            row_start, pos_start, num_tokens, table_row = columns[4 * index : 4 * index + 4]
            query_tiles.append(
                QueryTiles(row_start, pos_start, num_tokens, table_row, size, max_seq_len(tiles))
            )
        return cls(batch.block_ids, batch.block_offsets, block_tables, tuple(query_tiles))

    @classmethod
    def for_decode(
        cls,
        block_ids: Tensor,
        block_offsets: Tensor,
        pos_starts: Tensor,
        block_tables: Tensor,
        max_seq_len: int,
    ) -> AttentionMetadata:
        """Metadata of a decode step with one token per branch, at positions pos_starts [branches] int32.

        max_seq_len: upper bound of the sequence lengths with the new token, so that no tensor is read back.
        """
        row = torch.arange(len(pos_starts), dtype=torch.int32, device=pos_starts.device)
        tiles = QueryTiles(row, pos_starts, torch.ones_like(row), row, tile_size=1, max_seq_len=max_seq_len)
        return cls(block_ids, block_offsets, block_tables, (tiles,))


class PagedKVCache:
    """Same interface as `CPUPagedKVCache`: call `prepare` once per step, then `forward` once per layer.

    blocks: [layers, 2, num_blocks + 1, kv_heads, block_size, head_dim], keys then values; padding rows of a
    batch are written to the last block, `padding_block`, which is never allocated. metadata: that of the
    current step.
    """

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.block_size, self.num_kv_heads, self.padding_block = block_size, num_kv_heads, num_blocks
        shape = (num_layers, 2, num_blocks + 1, num_kv_heads, block_size, head_dim)
        self.blocks = torch.empty(shape, dtype=dtype, device=device)
        self.metadata: AttentionMetadata | None = None

    @staticmethod
    def block_bytes(
        num_layers: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> int:
        """Bytes of one block, over all layers."""
        return num_layers * 2 * num_kv_heads * block_size * head_dim * dtype.itemsize

    @in_stage("layout")
    def prepare(self, batch: RaggedBatch) -> None:
        """Build the attention metadata of a step."""
        self.metadata = AttentionMetadata.from_batch(batch, self.blocks.device)

    @in_stage("attention")
    def forward(
        self,
        layer: int,
        qkv: Tensor,
        rotary: RotaryCosSin,
        norm: QKNorm | None = None,
        params: AttentionParams = CAUSAL,
    ) -> Tensor:
        """See `CPUPagedKVCache.forward`; returns [rows, heads · head_dim] in the cache's dtype."""
        metadata, kv_cache = self.metadata, self.blocks[layer]
        assert metadata is not None, "call prepare before forward"
        queries = self.apply_rope(metadata, kv_cache, qkv, rotary, norm)
        return self.run_attention(metadata, kv_cache, queries, params).flatten(1)

    @in_stage("rope")
    def apply_rope(
        self,
        metadata: AttentionMetadata,
        kv_cache: Tensor,
        qkv: Tensor,
        rotary: RotaryCosSin,
        norm: QKNorm | None,
    ) -> Tensor:
        """Apply RoPE and write keys and values to a layer's blocks; see `rotary.rope_and_write_kv`."""
        return rope_and_write_kv(qkv, rotary, norm, kv_cache, metadata.block_ids, metadata.block_offsets)

    def run_attention(
        self, metadata: AttentionMetadata, kv_cache: Tensor, queries: Tensor, params: AttentionParams
    ) -> Tensor:
        """Attention of the queries over a layer's blocks; both [rows, heads, head_dim]."""
        out = torch.zeros_like(queries)
        for tiles in metadata.query_tiles:  # zeros except in the rows of the tiles
            out += paged_attention(queries, kv_cache, metadata.block_tables, tiles, params)
        return out

    def zero_blocks(self, block_ids: list[int]) -> None:
        """Does nothing: stale contents of a block are never read."""

    def swap_blocks(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Swap the contents of each pair of blocks in turn."""
        swap_blocks(self.blocks, pairs)


def _spans_by_tile_size(chunks: Sequence[SequenceChunk]) -> dict[int, list[tuple[int, int, int, int]]]:
    """Spans of decode tokens and of prompts by tile size; see `QueryTiles.from_spans`."""
    spans: dict[int, list[tuple[int, int, int, int]]] = {1: [], PREFILL_TILE: []}
    row = 0
    for index, chunk in enumerate(chunks):
        tile_size = 1 if chunk.num_new == 1 else PREFILL_TILE
        spans[tile_size].append((row, chunk.num_computed, chunk.num_new, index))
        row += chunk.num_new
    return spans


def _stack_block_tables(chunks: Sequence[SequenceChunk]) -> np.ndarray[Any, np.dtype[np.int32]]:
    """Stack the chunks' block tables into [chunks, max_blocks], padded with 0."""
    block_tables = np.zeros((len(chunks), max(len(chunk.block_table) for chunk in chunks)), np.int32)
    for row, chunk in zip(block_tables, chunks, strict=True):
        row[: len(chunk.block_table)] = chunk.block_table
    return block_tables
