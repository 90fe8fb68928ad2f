"""Reference of the CPU and Triton paged attention kernels in plain torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..attention_params import CAUSAL, AttentionParams
from .causal_mask import is_masked
from .softcap import softcap_


@dataclass(frozen=True)
class QueryTiles:
    """Tiles of at most `tile_size` consecutive query tokens of one branch.

    row_start, pos_start, num_tokens [tiles] int32: a tile's first row of the queries, that token's position,
    and its number of tokens. table_row [tiles] int32: its row of the block tables. max_seq_len: the most keys
    visible to any tile, known on the host.
    """

    row_start: Tensor
    pos_start: Tensor
    num_tokens: Tensor
    table_row: Tensor
    tile_size: int
    max_seq_len: int

    @classmethod
    def from_spans(
        cls, spans: Sequence[tuple[int, int, int, int]], tile_size: int, device: torch.device
    ) -> QueryTiles:
        """Split spans (first row, position, tokens, row of the block tables) into tiles of `tile_size`."""
        columns = split_tiles(spans, tile_size)
        # separate tensors: not every slice of one would be aligned
        row_start, pos_start, num_tokens, table_row = (
            torch.from_numpy(column.copy()).to(device) for column in columns
        )
        return cls(row_start, pos_start, num_tokens, table_row, tile_size, max_seq_len(columns))


def split_tiles(
    spans: Sequence[tuple[int, int, int, int]], tile_size: int
) -> np.ndarray[Any, np.dtype[np.int32]]:
    """Split spans, see `QueryTiles.from_spans`, into tiles of `tile_size`; returns columns [4, tiles]."""
    tiles = [
        (row_start + offset, pos_start + offset, min(tile_size, num_tokens - offset), table_row)
        for row_start, pos_start, num_tokens, table_row in spans
        for offset in range(0, num_tokens, tile_size)
    ]
    return np.ascontiguousarray(np.array(tiles, np.int32).T)


def max_seq_len(columns: np.ndarray[Any, np.dtype[np.int32]]) -> int:
    """The most keys visible to any of these tiles."""
    return int((columns[1] + columns[2]).max())


def paged_attention(
    q: Tensor,
    kv_cache: Tensor,
    block_tables: Tensor,
    query_tiles: QueryTiles,
    params: AttentionParams = CAUSAL,
) -> Tensor:
    """softmax(q kᵀ) v over each branch's keys up to the token itself; queries are already scaled.

    q [tokens, heads, head_dim]; kv_cache [2, num_blocks, kv_heads, block_size, head_dim] of one layer;
    block_tables [branches, max_blocks] int32 → [tokens, heads, head_dim] in the dtype of q.
    """
    _, num_heads, head_dim = q.shape
    _, _, num_kv_heads, block_size, _ = kv_cache.shape
    out, acc_dtype = torch.zeros_like(q), torch.promote_types(q.dtype, torch.float32)
    for row_start, pos_start, num_tokens, table_row in zip(
        query_tiles.row_start.tolist(),
        query_tiles.pos_start.tolist(),
        query_tiles.num_tokens.tolist(),
        query_tiles.table_row.tolist(),
        strict=True,
    ):
        seq_len, rows = pos_start + num_tokens, slice(row_start, row_start + num_tokens)
        block_ids = block_tables[table_row, : -(-seq_len // block_size)].long()
        k, v = (
            kv_cache[:, block_ids]
            .movedim(2, 1)
            .reshape(2, num_kv_heads, -1, head_dim)[:, :, :seq_len]
            .to(acc_dtype)
        )
        q_tile = q[rows].to(acc_dtype).view(num_tokens, num_kv_heads, num_heads // num_kv_heads, head_dim)
        scores = torch.einsum("tkgd,knd->tkgn", q_tile, k)
        if params.softcap is not None:
            scores = softcap_(scores, params.softcap)
        key_pos, query_pos = (
            torch.arange(*span, device=q.device) for span in ((seq_len,), (pos_start, seq_len))
        )
        masked = is_masked(key_pos, query_pos[:, None], params.window)[:, None, None]
        probs = scores.masked_fill(masked, -torch.inf).softmax(-1)
        out[rows] = torch.einsum("tkgn,knd->tkgd", probs, v).flatten(1, 2).to(out.dtype)
    return out
