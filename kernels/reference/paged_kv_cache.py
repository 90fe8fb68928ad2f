"""A paged KV cache on any device, in plain torch, and the layout of a step over it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..attention_metadata import swap_blocks
from ..attention_params import CAUSAL, AttentionParams
from ..common.transfer import to_device
from .paged_attention import QueryTiles, max_seq_len, paged_attention, split_tiles
from .rotary import rope_and_write_kv

if TYPE_CHECKING:
    from ..attention_metadata import RaggedBatch, SequenceChunk
    from .rotary import QKNorm, RotaryCosSin

PREFILL_TILE = 16
"""Tokens of a prompt that attend together."""


@dataclass(frozen=True)
class AttentionMetadata:
    """Where a step's tokens go and what they read.

    pages, block_offsets [tokens] int64: each token's place. block_tables [branches, pages] int32: the pages
    of each, in order. query_tiles: see `QueryTiles`; those that decode, and those of prompts.
    """

    block_ids: Tensor
    block_offsets: Tensor
    block_tables: Tensor
    query_tiles: tuple[QueryTiles, ...]

    @classmethod
    def from_batch(cls, batch: RaggedBatch, device: torch.device) -> AttentionMetadata:
        """The layout of any step, in one copy to the device."""
        spans_by_size = [
            (tile_size, spans) for tile_size, spans in _spans_by_tile_size(batch.chunks).items() if spans
        ]
        tile_columns = [split_tiles(found, size) for size, found in spans_by_size]
        block_tables, *columns = to_device(
            device,
            _stack_block_tables(batch.chunks),
            *(column for tile_column in tile_columns for column in tile_column),
        )
        query_tiles = []
        for index, ((size, _), one) in enumerate(zip(spans_by_size, tile_columns, strict=True)):
            row_start, pos_start, num_tokens, table_row = columns[4 * index : 4 * index + 4]
            query_tiles.append(
                QueryTiles(row_start, pos_start, num_tokens, table_row, size, max_seq_len(one))
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
        """That of a step in which every branch has one token: pos_starts [branches] int32, each token's
        position.

        max_seq_len: the most tokens that a branch may have with it; no tensor is read for it.
        """
        row = torch.arange(len(pos_starts), dtype=torch.int32, device=pos_starts.device)
        tiles = QueryTiles(row, pos_starts, torch.ones_like(row), row, tile_size=1, max_seq_len=max_seq_len)
        return cls(block_ids, block_offsets, block_tables, (tiles,))


class PagedKVCache:
    """As `kernels.cpu.paged_kv_cache.CPUPagedKVCache`: call `prepare` once a step, then `forward` once a
    layer.

    blocks: [layers, 2, pages + 1, kv_heads, block_size, head_dim], keys then values; the last page,
    `padding_block`, is nobody's: rows that only fill a batch up are written there. metadata: of the step
    that has begun.
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
        """What one page takes."""
        return num_layers * 2 * num_kv_heads * block_size * head_dim * dtype.itemsize

    def prepare(self, batch: RaggedBatch) -> None:
        """Prepares a step."""
        self.metadata = AttentionMetadata.from_batch(batch, self.blocks.device)

    def forward(
        self,
        layer: int,
        qkv: Tensor,
        rotary: RotaryCosSin,
        norm: QKNorm | None = None,
        params: AttentionParams = CAUSAL,
    ) -> Tensor:
        """See `kernels.cpu.paged_kv_cache.CPUPagedKVCache.forward`; [rows, heads · head_dim] in the
        cache's type.
        """
        metadata, kv_cache = self.metadata, self.blocks[layer]
        assert metadata is not None, "attend before begin"
        queries = self.apply_rope(metadata, kv_cache, qkv, rotary, norm)
        return self.run_attention(metadata, kv_cache, queries, params).flatten(1)

    def apply_rope(
        self,
        metadata: AttentionMetadata,
        kv_cache: Tensor,
        qkv: Tensor,
        rotary: RotaryCosSin,
        norm: QKNorm | None,
    ) -> Tensor:
        """Writes keys and values to a layer's pages; see `kernels.reference.rotary.rope_and_write_kv`."""
        return rope_and_write_kv(qkv, rotary, norm, kv_cache, metadata.block_ids, metadata.block_offsets)

    def run_attention(
        self, metadata: AttentionMetadata, kv_cache: Tensor, queries: Tensor, params: AttentionParams
    ) -> Tensor:
        """What the queries find in a layer's pages; both [rows, heads, head_dim]."""
        out = torch.zeros_like(queries)
        for tiles in metadata.query_tiles:  # each gives zeros but for its own tokens
            out += paged_attention(queries, kv_cache, metadata.block_tables, tiles, params)
        return out

    def zero_blocks(self, block_ids: list[int]) -> None:
        """Nothing: what a page held before is never read."""

    def swap_blocks(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Exchanges what pages hold, two by two, one after the other."""
        swap_blocks(self.blocks, pairs)


def _spans_by_tile_size(chunks: Sequence[SequenceChunk]) -> dict[int, list[tuple[int, int, int, int]]]:
    """Tokens that decode, and prompts, by the size of their tiles; see `QueryTiles.from_spans`."""
    spans: dict[int, list[tuple[int, int, int, int]]] = {1: [], PREFILL_TILE: []}
    row = 0
    for index, chunk in enumerate(chunks):
        tile_size = 1 if chunk.num_new == 1 else PREFILL_TILE
        spans[tile_size].append((row, chunk.num_computed, chunk.num_new, index))
        row += chunk.num_new
    return spans


def _stack_block_tables(chunks: Sequence[SequenceChunk]) -> np.ndarray[Any, np.dtype[np.int32]]:
    """The segments' pages, one below the other, [segments, most pages]; beyond a segment's own 0."""
    block_tables = np.zeros((len(chunks), max(len(chunk.block_table) for chunk in chunks)), np.int32)
    for row, segment in zip(block_tables, chunks, strict=True):
        row[: len(segment.block_table)] = segment.block_table
    return block_tables
