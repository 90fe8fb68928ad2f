"""Attention over a paged cache, written plainly: what the kernels for it are measured by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .causal_mask import is_hidden


@dataclass(frozen=True)
class Tiles:
    """Runs of consecutive tokens of one branch, each of at most `size`.

    first, start, count [tiles] int32: a run's first row among the queries, the position of that token, and
    how many tokens it has. table [tiles] int32: its row of the page tables. longest: the most keys that any
    of them sees, known to the host.
    """

    first: Tensor
    start: Tensor
    count: Tensor
    table: Tensor
    size: int
    longest: int

    @classmethod
    def of(cls, runs: Sequence[tuple[int, int, int, int]], size: int, device: torch.device) -> Tiles:
        """runs: (first row, position, tokens, row of the tables), cut into tiles of `size`."""
        columns = cut(runs, size)
        # a tensor each: parts of one would not all be aligned
        first, start, count, table = (torch.from_numpy(column.copy()).to(device) for column in columns)
        return cls(first, start, count, table, size, longest(columns))


def cut(runs: Sequence[tuple[int, int, int, int]], size: int) -> np.ndarray[Any, np.dtype[np.int32]]:
    """Runs, see `Tiles.of`, in tiles of `size`: their columns, [4, tiles]."""
    tiles = [
        (first + at, start + at, min(size, count - at), table)
        for first, start, count, table in runs
        for at in range(0, count, size)
    ]
    return np.ascontiguousarray(np.array(tiles, np.int32).T)


def longest(columns: np.ndarray[Any, np.dtype[np.int32]]) -> int:
    """The most keys that a tile of these sees."""
    return int((columns[1] + columns[2]).max())


def paged_attention(
    queries: Tensor, cache: Tensor, tables: Tensor, tiles: Tiles, window: int | None = None
) -> Tensor:
    """softmax(q kᵀ) v over each branch's own keys up to the token itself; queries come scaled.

    queries [tokens, heads, head_dim]; cache [2, pages, kv_heads, block_size, head_dim] of one layer; tables
    [branches, pages] int32 → [tokens, heads, head_dim] in the type of the queries. With a window a token sees
    itself and the window − 1 before it.
    """
    _, heads, width = queries.shape
    _, _, kv_heads, block, _ = cache.shape
    out, wide = torch.zeros_like(queries), torch.promote_types(queries.dtype, torch.float32)
    for first, start, count, table in zip(
        tiles.first.tolist(), tiles.start.tolist(), tiles.count.tolist(), tiles.table.tolist(), strict=True
    ):
        end, own = start + count, slice(first, first + count)
        pages = tables[table, : -(-end // block)].long()
        keys, values = cache[:, pages].movedim(2, 1).reshape(2, kv_heads, -1, width)[:, :, :end].to(wide)
        asked = queries[own].to(wide).view(count, kv_heads, heads // kv_heads, width)
        scores = torch.einsum("tkgd,knd->tkgn", asked, keys)
        key, token = (torch.arange(*span, device=queries.device) for span in ((end,), (start, end)))
        hidden = is_hidden(key, token[:, None], window)[:, None, None]
        shares = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        out[own] = torch.einsum("tkgn,knd->tkgd", shares, values).flatten(1, 2).to(out.dtype)
    return out
