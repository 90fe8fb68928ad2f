"""Batch-invariant paged attention: the bits of a token do not depend on the rest of the batch.

    invariant_attention_kernel  (tile, kv_head and row block, part)   softmax state of a range of key splits
    combine_splits_kernel       (tile, kv_head)   merge several parts in order; see `attention`

Decode tokens and prompt tokens are rows of programs of one height that run the same machine code. What
differs are runtime arguments without specialisation, such as `splits_per_part` (the splits that a program
processes in sequence) and `num_parts` (the programs that share a tile's splits). A split begins with an empty
state, and its key tiles begin at multiples of BLOCK_N, as windows do. States are merged in order:

    m' = max(m_i, m_j),  α = 2^(m_i - m'),  β = 2^(m_j - m'),  l' = α l_i + β l_j,  acc' = α acc_i + β acc_j

The splits of a decode token are merged by a second launch, those of a prompt inside the program. The bits are
the same: merging is elementwise, and FMA fusion is off, so every operation rounds separately. Merging with an
empty state, (MASK_VALUE, 0, 0), changes nothing: one of α and β is 1, the other 0. So keys that a tile reads
only for its other tokens have no effect. All key tiles are masked, while `attention` skips the mask where all
tokens see the tile. Each row of a tensor-core product is an independent sum.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..attention_params import CAUSAL
from . import tuning
from .attention import (
    MASK_VALUE,
    attention_inner,
    combine_splits_kernel,
    launch_constants,
    load_q_tile,
    merge_states,
)
from .dot import MIN_DOT_M, UPCAST

if TYPE_CHECKING:
    from ..attention_params import AttentionParams
    from ..reference.paged_attention import QueryTiles
    from .configs import AttentionConfig


@triton.jit(do_not_specialize=["stride_bt", "row_blocks", "num_parts", "splits_per_part", "window"])
def invariant_attention_kernel(
    q_ptr, k_cache_ptr, v_cache_ptr, block_tables_ptr, row_start_ptr, pos_start_ptr, num_tokens_ptr,
    table_row_ptr,
    out_ptr, acc_ptr, m_ptr, l_ptr, stride_bt, row_blocks, num_parts, splits_per_part, window,
    NUM_KV_HEADS: tl.constexpr, GQA_GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, KV_SPLIT: tl.constexpr,
    HAS_WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """stride_bt: entries per row of the block table. row_blocks: programs that share the rows of a tile.
    num_parts 1: the result is final; otherwise the state of each part is stored.
    """
    tile_idx, kv_head, part_idx = tl.program_id(0), tl.program_id(1) // row_blocks, tl.program_id(2)
    start_m = tl.program_id(1) % row_blocks * BLOCK_M
    row_start, pos_start = tl.load(row_start_ptr + tile_idx).to(tl.int64), tl.load(pos_start_ptr + tile_idx)
    num_tokens = tl.load(num_tokens_ptr + tile_idx)
    seq_len = pos_start + tl.minimum(num_tokens, (start_m + BLOCK_M - 1) // GQA_GROUP + 1)
    lo = pos_start * 0
    if HAS_WINDOW:
        lo = tl.maximum(pos_start - window + 1, 0) // BLOCK_N * BLOCK_N
    split_lo = tl.maximum(lo // KV_SPLIT, part_idx * splits_per_part)
    split_hi = tl.minimum((seq_len + KV_SPLIT - 1) // KV_SPLIT, part_idx * splits_per_part + splits_per_part)
    if split_lo >= split_hi or start_m >= num_tokens * GQA_GROUP:
        return
    block_table_ptr = block_tables_ptr + tl.load(table_row_ptr + tile_idx).to(tl.int64) * stride_bt
    offs_d, offs_m = tl.arange(0, BLOCK_D), start_m + tl.arange(0, BLOCK_M)
    q, q_pos, mask_m, q_offs = load_q_tile(
        q_ptr,
        row_start,
        pos_start,
        num_tokens,
        kv_head,
        start_m,
        NUM_KV_HEADS,
        GQA_GROUP,
        HEAD_DIM,
        BLOCK_D,
        BLOCK_M,
        UPCAST,
    )
    m_i = tl.full([BLOCK_M], MASK_VALUE, tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for split_idx in range(split_lo, split_hi):
        m_j = tl.full([BLOCK_M], MASK_VALUE, tl.float32)
        l_j = tl.zeros([BLOCK_M], tl.float32)
        acc_j = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        hi = tl.minimum(seq_len, split_idx * KV_SPLIT + KV_SPLIT)
        for start_n in range(tl.maximum(lo, split_idx * KV_SPLIT), hi, BLOCK_N):
            m_j, l_j, acc_j = attention_inner(
                q, m_j, l_j, acc_j, q_pos, start_n, hi, window,
                k_cache_ptr, v_cache_ptr, block_table_ptr, kv_head, NUM_KV_HEADS, HEAD_DIM, BLOCK_D,
                BLOCK_SIZE, BLOCK_N, HAS_WINDOW, SOFTCAP, True, UPCAST,
            )  # fmt: skip
        m_i, l_i, acc = merge_states(m_i, l_i, acc, m_j, l_j, acc_j)
    # masked stores instead of a branch, which spills registers on some GPUs
    part_mask = offs_m < tl.where(num_parts > 1, num_tokens * GQA_GROUP, 0)
    final_mask = offs_m < tl.where(num_parts > 1, 0, num_tokens * GQA_GROUP)
    part_offs = ((tile_idx.to(tl.int64) * NUM_KV_HEADS + kv_head) * num_parts + part_idx) * GQA_GROUP + offs_m
    tl.store(m_ptr + part_offs, m_i, mask=part_mask)
    tl.store(l_ptr + part_offs, l_i, mask=part_mask)
    mask_d = (offs_d < HEAD_DIM)[None, :]
    tl.store(acc_ptr + part_offs[:, None] * HEAD_DIM + offs_d[None, :], acc, mask=part_mask[:, None] & mask_d)
    l_i = tl.where(mask_m, l_i, 1.0)
    out_ptrs = out_ptr + q_offs[:, None] * HEAD_DIM + offs_d[None, :]
    tl.store(out_ptrs, acc / l_i[:, None], mask=final_mask[:, None] & mask_d)


def invariant_attention(
    queries: Tensor,
    cache: Tensor,
    block_tables: Tensor,
    tiles: QueryTiles,
    params: AttentionParams = CAUSAL,
    out: Tensor | None = None,
    config: AttentionConfig | None = None,
) -> Tensor:
    """Like `attention.paged_attention`; the bits of a token do not depend on the tile it is in."""
    config = config or tuning.get_launch_configs(queries.device).attention
    constexprs = launch_constants(queries, cache, params.window, config) | {"KV_SPLIT": config.split}
    num_kv_heads, gqa_group, head_dim = (
        constexprs["NUM_KV_HEADS"],
        constexprs["GQA_GROUP"],
        constexprs["HEAD_DIM"],
    )
    num_splits = triton.cdiv(tiles.max_seq_len, config.split)
    num_parts = num_splits if tiles.tile_size == 1 else 1
    out = torch.empty_like(queries) if out is None else out
    part_shape = (
        (len(tiles.row_start), num_kv_heads, num_parts, gqa_group) if num_parts > 1 else (1,)
    )  # float32 in any case, so that one variant is compiled
    part_acc = torch.empty(*part_shape, head_dim, device=queries.device)
    part_m, part_l = (torch.empty(part_shape, device=queries.device) for _ in range(2))
    row_blocks = triton.cdiv(gqa_group * tiles.tile_size, MIN_DOT_M)
    invariant_attention_kernel[(len(tiles.row_start), num_kv_heads * row_blocks, num_parts)](
        queries, cache[0], cache[1], block_tables, tiles.row_start, tiles.pos_start, tiles.num_tokens,
        tiles.table_row,
        out, part_acc, part_m, part_l, block_tables.shape[1], row_blocks, num_parts,
        num_splits // num_parts, params.window or 0,
        **constexprs, BLOCK_SIZE=cache.shape[3], BLOCK_M=MIN_DOT_M,
        SOFTCAP=params.softcap or 0.0, UPCAST=UPCAST,
        num_warps=config.warps, num_stages=config.stages, enable_fp_fusion=False,
    )  # fmt: skip
    if num_parts > 1:
        combine_splits_kernel[(len(tiles.row_start), num_kv_heads)](
            part_acc, part_m, part_l, tiles.row_start, tiles.pos_start, out, num_parts, params.window or 0,
            **constexprs, BLOCK_M=triton.next_power_of_2(gqa_group), enable_fp_fusion=False,
        )  # fmt: skip
    return out
