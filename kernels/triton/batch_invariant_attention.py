"""Batch-invariant paged attention: the bits of a token do not depend on its neighbours.

    attend_splits (tile, kv_head and some of the tile's rows, part)   the state of some splits of the keys
    merge         (tile, kv_head)   the parts' states in order, where they are several: see `attention`

A decoding token and the tokens of a prompt are rows of programs of one height, which run the same machine
code: what differs are plain arguments that nothing is compiled for, such as `each` (the splits that a program
takes, one after the other) and `parts` (the programs that share a tile's splits). A split begins with an
empty state, and its keys come in steps that begin at multiples of KEYS, as windows do. States are merged in
order:

    top' = max(top, peak),   f = 2^(top - top'),   g = 2^(peak - top'),   total' = f total + g weight, and
    mixed' alike

A decoding token's splits are merged by a second launch, and a prompt's where they were made. This makes no
difference: merging is elementwise, and products are not fused with sums, so that every operation rounds on
its own. An empty state, (HIDDEN, 0, 0), is no part of what is merged with it: one of f and g is 1, the other
0. So keys that a tile reads for its other tokens leave no trace. All keys are masked, where `attention` has
code of its own for those that the whole tile sees. Of a tensor core's product each row is a sum of its own.
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
    """width: pages of a table's row. row_blocks: programs that share a tile's rows. parts 1: the result is
    final; else each part's state is stored.
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
    # stores are masked: with a branch the code for some GPUs spills
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
    """As `attention.paged_attention`, to the same bits for a token whatever tile it is in."""
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
    )  # of one type in any case
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
