"""Paged attention with online softmax, split-KV decoding, and all query heads of a GQA group in one tile.

    attention_kernel       (tile, kv_head, split)   online softmax over one split of the keys
    combine_splits_kernel  (tile, kv_head)          merge the splits of a decode token, in order

A decode token is a tile of one token. Its keys are cut into splits of a fixed length, so that a long context
fills the device and a result does not depend on the other rows (FlashDecoding). A prompt has tiles of many
tokens and one split. Only key tiles that are not visible to every token of the query tile are masked. The
heads of a GQA group share their keys, so they are rows of one matrix product. Cache offsets are 64-bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..attention_params import CAUSAL
from ..reference import causal_mask
from . import tuning
from .dot import MIN_DOT_M, UPCAST

if TYPE_CHECKING:
    from ..attention_params import AttentionParams
    from ..reference.paged_attention import QueryTiles
    from .configs import AttentionConfig

MASK_VALUE = tl.constexpr(causal_mask.MASK_VALUE)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def load_q_tile(
    q_ptr, row_start, pos_start, num_tokens, kv_head, start_m,
    NUM_KV_HEADS: tl.constexpr, GQA_GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Load BLOCK_M rows of a tile: queries, positions, row mask, and offsets in the query tensor."""
    offs_d, offs_m = tl.arange(0, BLOCK_D), start_m + tl.arange(0, BLOCK_M)
    mask_m = offs_m < num_tokens * GQA_GROUP
    q_offs = ((row_start + offs_m // GQA_GROUP) * NUM_KV_HEADS + kv_head) * GQA_GROUP + offs_m % GQA_GROUP
    q_mask = mask_m[:, None] & (offs_d < HEAD_DIM)[None, :]
    q = tl.load(q_ptr + q_offs[:, None] * HEAD_DIM + offs_d[None, :], mask=q_mask, other=0.0)
    if UPCAST:
        q = q.to(tl.float32)
    return q, pos_start + offs_m // GQA_GROUP, mask_m, q_offs


@triton.jit
def attention_inner(
    q, m_i, l_i, acc, q_pos, start_n, hi, window, k_cache_ptr, v_cache_ptr, block_table_ptr, kv_head,
    NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr, HAS_WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, APPLY_MASK: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Add BLOCK_N keys to the running maximum m_i, sum l_i and accumulator acc of every row.

    SOFTCAP: of the scores, 0 for none.
    """
    offs_d = tl.arange(0, BLOCK_D)
    offs_n = start_n + tl.arange(0, BLOCK_N)
    mask_n = offs_n < hi
    block_idx = tl.load(block_table_ptr + offs_n // BLOCK_SIZE, mask=mask_n, other=0).to(tl.int64)
    kv_offs = ((block_idx * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + offs_n % BLOCK_SIZE) * HEAD_DIM
    kv_mask = mask_n[:, None] & (offs_d < HEAD_DIM)[None, :]
    k = tl.load(k_cache_ptr + kv_offs[:, None] + offs_d[None, :], mask=kv_mask, other=0.0)
    v = tl.load(v_cache_ptr + kv_offs[:, None] + offs_d[None, :], mask=kv_mask, other=0.0)
    if UPCAST:
        k, v = k.to(tl.float32), v.to(tl.float32)
    qk = tl.dot(q, tl.trans(k), input_precision="ieee")
    if SOFTCAP > 0:  # tanh(x) = 2 sigmoid(2x) - 1
        qk = SOFTCAP * (2 * tl.sigmoid(qk * (2 / SOFTCAP)) - 1)
    qk = qk * LOG2E
    if APPLY_MASK:
        attn_mask = (offs_n[None, :] <= q_pos[:, None]) & mask_n[None, :]
        if HAS_WINDOW:
            attn_mask = attn_mask & (offs_n[None, :] > q_pos[:, None] - window)
        qk = tl.where(attn_mask, qk, MASK_VALUE)
    m_new = tl.maximum(m_i, tl.max(qk, axis=1))
    p = tl.exp2(qk - m_new[:, None])
    if APPLY_MASK:
        p = tl.where(attn_mask, p, 0.0)
    alpha = tl.exp2(m_i - m_new)
    l_i = l_i * alpha + tl.sum(p, axis=1)
    acc = acc * alpha[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
    return m_new, l_i, acc


@triton.jit(do_not_specialize=["stride_bt", "num_splits", "window"])
def attention_kernel(
    q_ptr, k_cache_ptr, v_cache_ptr, block_tables_ptr, row_start_ptr, pos_start_ptr, num_tokens_ptr,
    table_row_ptr,
    out_ptr, m_ptr, l_ptr, stride_bt, num_splits, window,
    NUM_KV_HEADS: tl.constexpr, GQA_GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, KV_SPLIT: tl.constexpr,
    HAS_WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """stride_bt: entries per block-table row. KV_SPLIT 0: one split has all keys and writes the output."""
    tile_idx, kv_head, split_idx = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row_start, pos_start = tl.load(row_start_ptr + tile_idx).to(tl.int64), tl.load(pos_start_ptr + tile_idx)
    num_tokens = tl.load(num_tokens_ptr + tile_idx)
    seq_len = pos_start + num_tokens
    lo = pos_start * 0
    hi = seq_len
    if HAS_WINDOW:
        lo = tl.maximum(pos_start - window + 1, 0) // BLOCK_N * BLOCK_N
    if KV_SPLIT > 0:
        lo = tl.maximum(lo, split_idx * KV_SPLIT)
        hi = tl.minimum(seq_len, split_idx * KV_SPLIT + KV_SPLIT)
    if lo >= hi:
        return
    block_table_ptr = block_tables_ptr + tl.load(table_row_ptr + tile_idx).to(tl.int64) * stride_bt
    offs_d, offs_m = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_M)
    q, q_pos, mask_m, q_offs = load_q_tile(
        q_ptr,
        row_start,
        pos_start,
        num_tokens,
        kv_head,
        0,
        NUM_KV_HEADS,
        GQA_GROUP,
        HEAD_DIM,
        BLOCK_D,
        BLOCK_M,
        UPCAST,
    )
    q_mask = mask_m[:, None] & (offs_d < HEAD_DIM)[None, :]
    m_i = tl.full([BLOCK_M], MASK_VALUE, tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    unmasked_hi = lo
    if not HAS_WINDOW:  # key tiles that every token sees
        unmasked_hi = lo + tl.maximum(tl.minimum(hi, pos_start + 1) - lo, 0) // BLOCK_N * BLOCK_N
        for start_n in range(lo, unmasked_hi, BLOCK_N):
            m_i, l_i, acc = attention_inner(
                q, m_i, l_i, acc, q_pos, start_n, hi, window, k_cache_ptr, v_cache_ptr, block_table_ptr,
                kv_head,
                NUM_KV_HEADS, HEAD_DIM, BLOCK_D, BLOCK_SIZE, BLOCK_N, HAS_WINDOW, SOFTCAP, False, UPCAST,
            )  # fmt: skip
    for start_n in range(unmasked_hi, hi, BLOCK_N):
        m_i, l_i, acc = attention_inner(
            q, m_i, l_i, acc, q_pos, start_n, hi, window, k_cache_ptr, v_cache_ptr, block_table_ptr, kv_head,
            NUM_KV_HEADS, HEAD_DIM, BLOCK_D, BLOCK_SIZE, BLOCK_N, HAS_WINDOW, SOFTCAP, True, UPCAST,
        )  # fmt: skip
    if KV_SPLIT > 0:
        split_offs = (
            (tile_idx.to(tl.int64) * NUM_KV_HEADS + kv_head) * num_splits + split_idx
        ) * GQA_GROUP + offs_m
        tl.store(m_ptr + split_offs, m_i, mask=mask_m)
        tl.store(l_ptr + split_offs, l_i, mask=mask_m)
        tl.store(out_ptr + split_offs[:, None] * HEAD_DIM + offs_d[None, :], acc, mask=q_mask)
    else:
        l_i = tl.where(mask_m, l_i, 1.0)
        tl.store(out_ptr + q_offs[:, None] * HEAD_DIM + offs_d[None, :], acc / l_i[:, None], mask=q_mask)


@triton.jit
def merge_states(m_i, l_i, acc, m_j, l_j, acc_j):
    """Merge two online-softmax states (maximum, sum, accumulator) of every row."""
    m_new = tl.maximum(m_i, m_j)
    alpha, beta = tl.exp2(m_i - m_new), tl.exp2(m_j - m_new)
    return m_new, l_i * alpha + beta * l_j, acc * alpha[:, None] + beta[:, None] * acc_j


@triton.jit(do_not_specialize=["num_splits", "window"])
def combine_splits_kernel(
    acc_ptr, m_ptr, l_ptr, row_start_ptr, pos_start_ptr, out_ptr, num_splits, window,
    NUM_KV_HEADS: tl.constexpr, GQA_GROUP: tl.constexpr, BLOCK_M: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, KV_SPLIT: tl.constexpr, HAS_WINDOW: tl.constexpr,
):  # fmt: skip
    tile_idx, kv_head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row_start, pos_start = tl.load(row_start_ptr + tile_idx).to(tl.int64), tl.load(pos_start_ptr + tile_idx)
    offs_d, offs_m = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_M)
    mask_m = offs_m < GQA_GROUP
    q_mask = mask_m[:, None] & (offs_d < HEAD_DIM)[None, :]
    m_i = tl.full([BLOCK_M], MASK_VALUE, tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    lo = pos_start * 0
    if HAS_WINDOW:
        lo = tl.maximum(pos_start - window + 1, 0) // BLOCK_N * BLOCK_N // KV_SPLIT
    for split_idx in range(lo, pos_start // KV_SPLIT + 1):
        split_offs = ((tile_idx * NUM_KV_HEADS + kv_head) * num_splits + split_idx) * GQA_GROUP + offs_m
        m_j = tl.load(m_ptr + split_offs, mask=mask_m, other=MASK_VALUE)
        l_j = tl.load(l_ptr + split_offs, mask=mask_m, other=0.0)
        acc_j = tl.load(acc_ptr + split_offs[:, None] * HEAD_DIM + offs_d[None, :], mask=q_mask, other=0.0)
        m_i, l_i, acc = merge_states(m_i, l_i, acc, m_j, l_j, acc_j)
    l_i = tl.where(mask_m, l_i, 1.0)
    q_offs = (row_start * NUM_KV_HEADS + kv_head) * GQA_GROUP + offs_m
    tl.store(out_ptr + q_offs[:, None] * HEAD_DIM + offs_d[None, :], acc / l_i[:, None], mask=q_mask)


def launch_constants(
    queries: Tensor, cache: Tensor, window: int | None, config: AttentionConfig
) -> dict[str, int]:
    """Constexpr arguments that the attention kernels share."""
    num_kv_heads, head_dim = cache.shape[2], queries.shape[2]
    return {
        "NUM_KV_HEADS": num_kv_heads,
        "GQA_GROUP": queries.shape[1] // num_kv_heads,
        "HEAD_DIM": head_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "BLOCK_N": 2 * config.keys // cache.itemsize,
        "HAS_WINDOW": window is not None,
    }


def paged_attention(
    queries: Tensor,
    cache: Tensor,
    block_tables: Tensor,
    tiles: QueryTiles,
    params: AttentionParams = CAUSAL,
    out: Tensor | None = None,
    config: AttentionConfig | None = None,
) -> Tensor:
    """See `kernels.reference.paged_attention.paged_attention`; one-token tiles are decoded in splits.

    Only the tokens of the tiles are written to `out`, which has the shape and dtype of the queries. config:
    None for the launch config of the device.
    """
    config = config or tuning.get_launch_configs(queries.device).attention
    constexprs, block_size = launch_constants(queries, cache, params.window, config), cache.shape[3]
    num_kv_heads, gqa_group, head_dim = (
        constexprs["NUM_KV_HEADS"],
        constexprs["GQA_GROUP"],
        constexprs["HEAD_DIM"],
    )
    is_decode = tiles.tile_size == 1
    num_splits = triton.cdiv(tiles.max_seq_len, config.split) if is_decode else 1
    out = torch.empty_like(queries) if out is None else out
    split_acc, split_m, split_l = out, out, out
    if is_decode:
        split_acc = torch.empty(
            len(tiles.row_start), num_kv_heads, num_splits, gqa_group, head_dim, device=queries.device
        )
        split_m, split_l = (torch.empty(split_acc.shape[:-1], device=queries.device) for _ in range(2))
    block_m = max(MIN_DOT_M, triton.next_power_of_2(gqa_group * tiles.tile_size))
    attention_kernel[(len(tiles.row_start), num_kv_heads, num_splits)](
        queries, cache[0], cache[1], block_tables, tiles.row_start, tiles.pos_start, tiles.num_tokens,
        tiles.table_row,
        split_acc, split_m, split_l, block_tables.shape[1], num_splits, params.window or 0,
        **constexprs, BLOCK_SIZE=block_size, BLOCK_M=block_m, KV_SPLIT=config.split if is_decode else 0,
        SOFTCAP=params.softcap or 0.0, UPCAST=UPCAST,
        num_warps=config.warps if is_decode else config.prompt_warps, num_stages=config.stages,
    )  # fmt: skip
    if is_decode:
        combine_splits_kernel[(len(tiles.row_start), num_kv_heads)](
            split_acc, split_m, split_l, tiles.row_start, tiles.pos_start, out, num_splits,
            params.window or 0,
            **constexprs, BLOCK_M=triton.next_power_of_2(gqa_group), KV_SPLIT=config.split,
        )  # fmt: skip
    return out
