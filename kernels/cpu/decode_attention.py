"""CPU decode attention over a paged KV cache, one query per row, over all used blocks at once.

Multiply each used KV block in place with the queries of the row that reads it, gather the scores of a row for
one softmax, and multiply the probabilities with the same blocks:

    s_j = q k_jᵀ,    p = softmax(s_1 … s_n),    o = Σ_j p_j v_j.

Only queries, scores and outputs are gathered, never keys or values, except that a shared block is copied for
its second and further readers. Between two layers' large matmuls every operation is dispatched from a cold
cache, so indices and buffers are reused for as long as the rows read the same blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..reference.causal_mask import MASK_VALUE, mask_bias
from ..reference.softcap import softcap_
from .block_pool import KVBlockPool, ReadKV
from .shared_blocks import BlockSharing


@dataclass(frozen=True)
class _BlockMatmul:
    """One batched matmul: its KV blocks and the query rows multiplied with them, as views of the buffers.

    queries, out [num_blocks · kv_heads, rows, width]; scores, probs: block_size instead of width. rows: its
    range of the buffers' rows. read_kv: see `KVBlockPool.block_view`.
    """

    read_kv: ReadKV
    queries: Tensor
    scores: Tensor
    probs: Tensor
    out: Tensor
    rows: slice


class DecodeAttention:
    """Decode attention of a fixed set of rows: indices and buffers for the matmuls.

    token_rows [rows]: the rows' indices in the batch. Outputs have `num_padding` more rows, copies of the
    last. Stores views of the pool's blocks but not the pool, which owns this object: a reference would form a
    cycle and delay freeing the pool's memory.
    """

    def __init__(
        self, pool: KVBlockPool, sharing: BlockSharing, token_rows: Tensor, num_padding: int, num_heads: int
    ) -> None:
        self._block_size, num_kv_heads, group_size = (
            pool.block_size,
            pool.num_kv_heads,
            num_heads // pool.num_kv_heads,
        )
        rows_per_block, rows_per_shared_block = (
            pool.padded_gemm_rows(group_size),
            pool.padded_gemm_rows(sharing.max_extra_readers * group_size),
        )
        self._matmuls, num_rows = list[_BlockMatmul](), 0
        self._buffers = _allocate_buffers(pool, sharing, rows_per_block, rows_per_shared_block)
        self._score_rows = self._buffers[1][:-1]
        matmuls = _plan_matmuls(pool, sharing, rows_per_block, rows_per_shared_block)
        for block_ids, count, rows in matmuls:
            row_slice = slice(num_rows, num_rows + count * num_kv_heads * rows)
            queries, scores, probs, out = (x[row_slice].unflatten(0, (-1, rows)) for x in self._buffers)
            read_kv = pool.block_view(block_ids, exclusive=len(matmuls) == 1)
            self._matmuls.append(_BlockMatmul(read_kv, queries, scores, probs, out, row_slice))
            num_rows = row_slice.stop
        row_index = _query_row_index(
            sharing, rows_per_block, rows_per_shared_block, num_kv_heads, group_size
        )  # [max_blocks, rows, kv_heads, group]
        valid = ~sharing.pad_mask
        row_index = torch.where(
            valid[:, :, None, None], row_index, num_rows
        )  # the extra row, which no matmul writes
        max_blocks, count = valid.shape
        q_index = token_rows[:, None] * (num_heads + 2 * num_kv_heads) + torch.arange(num_heads)
        probs_index = (
            torch.arange(row_index.numel())
            .view(count, num_kv_heads, group_size, max_blocks)
            .permute(3, 0, 1, 2)
        )
        self._valid, self._valid_rows = valid, row_index[valid]
        self._q_index = self._scatter(
            q_index.view(1, count, num_kv_heads, group_size).expand_as(row_index)[valid], num_rows
        )
        self._probs_index = self._scatter(probs_index[valid], num_rows)
        self._score_index = row_index.permute(1, 2, 3, 0).flatten()
        seq_index = torch.arange(count + num_padding).clamp(max=count - 1)
        self._out_index = row_index[:, seq_index].flatten()
        self._shape = (max_blocks, count + num_padding, num_heads, pool.padded_head_dim)

    def build_bias(self, seq_lens: Tensor, window: int | None) -> list[Tensor]:
        """Mask bias of each matmul: 0 for a visible key, else MASK_VALUE. seq_lens [rows]: cached tokens."""
        max_blocks = len(self._valid)
        key_pos = torch.arange(max_blocks * self._block_size).view(max_blocks, 1, -1)
        row_bias = mask_bias(key_pos, seq_lens[:, None] - 1, window)[self._valid]
        bias = torch.zeros_like(self._buffers[1])
        bias[self._valid_rows] = row_bias[:, None, None]
        return [bias[matmul.rows].view_as(matmul.scores) for matmul in self._matmuls]

    def forward(self, layer: int, qkv: Tensor, bias: list[Tensor], softcap: float | None = None) -> Tensor:
        """qkv [·, width]: the batch's scaled queries, keys, values → [rows + num_padding, heads, width]."""
        queries, scores, probs, out = self._buffers
        torch.index_select(qkv, 0, self._q_index, out=queries)
        for matmul, block_bias in zip(self._matmuls, bias, strict=True):
            keys = matmul.read_kv(layer, 0).transpose(1, 2)
            if softcap is None:
                torch.baddbmm(block_bias, matmul.queries, keys, out=matmul.scores)
            else:  # the cap stands between the product and the mask
                torch.bmm(matmul.queries, keys, out=matmul.scores)
                softcap_(matmul.scores, softcap).add_(block_bias)
        max_blocks, num_seqs, num_heads, width = self._shape
        if max_blocks == 1:
            torch.softmax(self._score_rows, -1, out=probs)
        else:
            seq_scores = scores.index_select(0, self._score_index)
            seq_scores = seq_scores.view(-1, max_blocks * self._block_size).softmax(-1)
            torch.index_select(seq_scores.view(-1, self._block_size), 0, self._probs_index, out=probs)
        for matmul in self._matmuls:
            torch.bmm(matmul.probs, matmul.read_kv(layer, 1), out=matmul.out)
        return pairwise_sum(out.index_select(0, self._out_index).view(max_blocks, num_seqs, num_heads, width))

    def _scatter(self, values: Tensor, num_rows: int) -> Tensor:
        """Scatter the values to the rows in use; padding rows of a matmul get 0."""
        out = torch.zeros(num_rows, dtype=torch.int64)
        out[self._valid_rows] = values
        return out


def _allocate_buffers(
    pool: KVBlockPool, sharing: BlockSharing, rows_per_block: int, rows_per_shared_block: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, scores, probabilities and outputs of all matmuls; scores and outputs have one extra row.

    The extra row stands for blocks beyond a row's last: masked scores and an output of zeros.
    """
    num_rows = (
        sharing.num_blocks * rows_per_block + len(sharing.shared_blocks) * rows_per_shared_block
    ) * pool.num_kv_heads
    queries, probs = torch.empty(num_rows, pool.padded_head_dim), torch.empty(num_rows, pool.block_size)
    scores, out = torch.empty(num_rows + 1, pool.block_size), torch.empty(num_rows + 1, pool.padded_head_dim)
    scores[-1], out[-1] = MASK_VALUE, 0.0
    return queries, scores, probs, out


def _plan_matmuls(
    pool: KVBlockPool, sharing: BlockSharing, rows_per_block: int, rows_per_shared_block: int
) -> list[tuple[slice | Tensor, int, int]]:
    """(block ids, number of blocks, query rows per block and KV head) of every matmul."""
    max_blocks = pool.blocks_per_gemm
    starts = range(0, sharing.num_blocks, max_blocks)
    spans = [(start, min(start + max_blocks, sharing.num_blocks)) for start in starts]
    matmuls: list[tuple[slice | Tensor, int, int]] = [(slice(a, b), b - a, rows_per_block) for a, b in spans]
    return matmuls + (
        [(sharing.shared_blocks, len(sharing.shared_blocks), rows_per_shared_block)]
        if len(sharing.shared_blocks)
        else []
    )


def _query_row_index(
    sharing: BlockSharing, rows_per_block: int, rows_per_shared_block: int, num_kv_heads: int, group_size: int
) -> Tensor:
    """Row of each read's queries in the buffers, [max_blocks, rows, kv_heads, group]."""
    extra = sharing.read_index - sharing.num_blocks
    shared_block, extra_reader = (
        extra // max(1, sharing.max_extra_readers),
        extra % max(1, sharing.max_extra_readers),
    )
    shared_start = (
        sharing.num_blocks * rows_per_block + shared_block * rows_per_shared_block
    ) * num_kv_heads + extra_reader * group_size
    start = torch.where(extra < 0, sharing.read_index * rows_per_block * num_kv_heads, shared_start)[
        ..., None, None
    ]
    stride = torch.where(extra < 0, rows_per_block, rows_per_shared_block)[..., None, None]
    return start + stride * torch.arange(num_kv_heads)[:, None] + torch.arange(group_size)


def pairwise_sum(x: Tensor) -> Tensor:
    """Σ x over the first dimension, pairwise, so that trailing zeros change no bit. Overwrites x.

    `sum(0)` would round the last columns, which do not fill a SIMD vector, differently from the rest.
    """
    while len(x) > 1:
        x[:-1:2] += x[1::2]
        x = x[::2]
    return x[0]
