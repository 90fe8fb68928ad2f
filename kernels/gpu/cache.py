"""A paged KV cache that the attention kernel reads."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..paged import Tiles
from .attention import paged_attention

if TYPE_CHECKING:
    from ..layout import Batch, Segment

PROMPT_TILE = 16
"""Tokens of a prompt that attend together."""


class TritonKV:
    """As `kernels.attention.PagedKV`: call `begin` once a step, then `attend` once a layer.

    pages: [layers, 2, pages, kv_heads, block_size, head_dim], keys then values.
    """

    def __init__(
        self,
        layers: int,
        pages: int,
        block_size: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.block_size, self.kv_heads = block_size, kv_heads
        self.pages = torch.empty(layers, 2, pages, kv_heads, block_size, head_dim, dtype=dtype)
        self._batch: Batch | None = None
        self._tiles: list[Tiles] = []
        self._tables = torch.empty(0)

    @staticmethod
    def page_bytes(
        layers: int, block_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype = torch.float32
    ) -> int:
        """What one page takes."""
        return layers * 2 * kv_heads * block_size * head_dim * dtype.itemsize

    def begin(self, batch: Batch) -> None:
        """Prepares a step."""
        width = max(len(segment.pages) for segment in batch.segments)
        tables = [segment.pages + [0] * (width - len(segment.pages)) for segment in batch.segments]
        self._batch = batch
        self._tables = torch.tensor(tables, dtype=torch.int32, device=self.pages.device)
        self._tiles = [
            Tiles.of(runs, size, self.pages.device) for size, runs in _runs(batch.segments).items() if runs
        ]

    def attend(self, layer: int, qkv: Tensor, window: int | None = None) -> Tensor:
        """Stores keys and values, and returns softmax(q kᵀ) v over each branch's context.

        qkv [rows of the batch, heads + 2 · kv_heads, head_dim], queries first, scaled, then keys, then values
        → [rows, heads · head_dim]. With a window, a token sees itself and the window − 1 before it.
        """
        batch = self._batch
        assert batch is not None, "attend before begin"
        heads, tokens = qkv.shape[1] - 2 * self.kv_heads, len(batch.pages)
        held = qkv.to(self.pages.dtype)
        for side, part in enumerate(held[:tokens, heads:].split(self.kv_heads, 1)):
            self.pages[layer, side, batch.pages, :, batch.offsets] = part
        queries = held[:, :heads].contiguous()
        found = torch.zeros_like(queries)
        for tiles in self._tiles:
            paged_attention(queries, self.pages[layer], self._tables, tiles, window, found)
        return found.flatten(1)

    def clear(self, pages: list[int]) -> None:
        """Nothing: what a page held before is never read."""

    def swap(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Exchanges what pages hold, two by two, one after the other."""
        for one, other in pairs:
            self.pages[:, :, [one, other]] = self.pages[:, :, [other, one]]


def _runs(segments: list[Segment]) -> dict[int, list[tuple[int, int, int, int]]]:
    """Tokens that decode, and prompts, by the size of their tiles; see `Tiles.of`."""
    found: dict[int, list[tuple[int, int, int, int]]] = {1: [], PROMPT_TILE: []}
    first = 0
    for index, segment in enumerate(segments):
        size = 1 if segment.count == 1 else PROMPT_TILE
        found[size].append((first, segment.start, segment.count, index))
        first += segment.count
    return found
