"""A paged KV cache that may lie on any device, and the layout of a step over it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..attention_metadata import exchange
from ..common.transfer import send
from .paged_attention import Tiles, cut, longest, paged_attention
from .rotary import rope_write

if TYPE_CHECKING:
    from ..attention_metadata import Batch, Segment
    from .rotary import HeadNorm, Turns

PROMPT_TILE = 16
"""Tokens of a prompt that attend together."""


@dataclass(frozen=True)
class Layout:
    """Where a step's tokens go and what they read.

    pages, offsets [tokens] int64: each token's place. tables [branches, pages] int32: the pages of each, in
    order. tiles: see `Tiles`; those that decode, and those of prompts.
    """

    pages: Tensor
    offsets: Tensor
    tables: Tensor
    tiles: tuple[Tiles, ...]

    @classmethod
    def of(cls, batch: Batch, device: torch.device) -> Layout:
        """The layout of any step, in one copy to the device."""
        runs = [(size, found) for size, found in _runs(batch.segments).items() if found]
        parts = [cut(found, size) for size, found in runs]
        tables, *columns = send(device, _tables(batch.segments), *(column for one in parts for column in one))
        tiles = []
        for index, ((size, _), one) in enumerate(zip(runs, parts, strict=True)):
            first, start, count, table = columns[4 * index : 4 * index + 4]
            tiles.append(Tiles(first, start, count, table, size, longest(one)))
        return cls(batch.pages, batch.offsets, tables, tuple(tiles))

    @classmethod
    def decoding(cls, pages: Tensor, offsets: Tensor, starts: Tensor, tables: Tensor, longest: int) -> Layout:
        """That of a step in which every branch has one token: starts [branches] int32, each token's position.

        longest: the most tokens that a branch may have with it; no tensor is read for it.
        """
        row = torch.arange(len(starts), dtype=torch.int32, device=starts.device)
        tiles = Tiles(row, starts, torch.ones_like(row), row, size=1, longest=longest)
        return cls(pages, offsets, tables, (tiles,))


class DeviceKV:
    """As `kernels.cpu.paged_kv_cache.PagedKV`: call `begin` once a step, then `attend` once a layer.

    pages: [layers, 2, pages + 1, kv_heads, block_size, head_dim], keys then values; the last page, `spare`,
    is nobody's: rows that only fill a batch up are written there. layout: of the step that has begun.
    """

    def __init__(
        self,
        layers: int,
        pages: int,
        block_size: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.block_size, self.kv_heads, self.spare = block_size, kv_heads, pages
        shape = (layers, 2, pages + 1, kv_heads, block_size, head_dim)
        self.pages = torch.empty(shape, dtype=dtype, device=device)
        self.layout: Layout | None = None

    @staticmethod
    def page_bytes(layers: int, block_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        """What one page takes."""
        return layers * 2 * kv_heads * block_size * head_dim * dtype.itemsize

    def begin(self, batch: Batch) -> None:
        """Prepares a step."""
        self.layout = Layout.of(batch, self.pages.device)

    def attend(
        self,
        layer: int,
        qkv: Tensor,
        turns: Turns,
        norm: HeadNorm | None = None,
        window: int | None = None,
    ) -> Tensor:
        """See `kernels.cpu.paged_kv_cache.PagedKV.attend`; [rows, heads · head_dim] in the cache's type."""
        layout, pages = self.layout, self.pages[layer]
        assert layout is not None, "attend before begin"
        queries = self.turn(layout, pages, qkv, turns, norm)
        return self.read(layout, pages, queries, window).flatten(1)

    def turn(self, layout: Layout, pages: Tensor, qkv: Tensor, turns: Turns, norm: HeadNorm | None) -> Tensor:
        """Writes keys and values to a layer's pages; see `kernels.reference.rotary.rope_write`."""
        return rope_write(qkv, turns, norm, pages, layout.pages, layout.offsets)

    def read(self, layout: Layout, pages: Tensor, queries: Tensor, window: int | None) -> Tensor:
        """What the queries find in a layer's pages; both [rows, heads, head_dim]."""
        found = torch.zeros_like(queries)
        for tiles in layout.tiles:  # each gives zeros but for its own tokens
            found += paged_attention(queries, pages, layout.tables, tiles, window)
        return found

    def clear(self, pages: list[int]) -> None:
        """Nothing: what a page held before is never read."""

    def swap(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Exchanges what pages hold, two by two, one after the other."""
        exchange(self.pages, pairs)


def _runs(segments: Sequence[Segment]) -> dict[int, list[tuple[int, int, int, int]]]:
    """Tokens that decode, and prompts, by the size of their tiles; see `Tiles.of`."""
    found: dict[int, list[tuple[int, int, int, int]]] = {1: [], PROMPT_TILE: []}
    first = 0
    for index, segment in enumerate(segments):
        size = 1 if segment.count == 1 else PROMPT_TILE
        found[size].append((first, segment.start, segment.count, index))
        first += segment.count
    return found


def _tables(segments: Sequence[Segment]) -> np.ndarray[Any, np.dtype[np.int32]]:
    """The segments' pages, one below the other, [segments, most pages]; beyond a segment's own 0."""
    found = np.zeros((len(segments), max(len(segment.pages) for segment in segments)), np.int32)
    for row, segment in zip(found, segments, strict=True):
        row[: len(segment.pages)] = segment.pages
    return found
