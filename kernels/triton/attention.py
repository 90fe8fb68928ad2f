"""Attention over a paged cache: a tile of a branch's tokens against its keys, all heads of a group at once.

    attend (tile, kv_head, split)   scores, shares and their sums over one split of the keys, online
    merge  (tile, kv_head)          the splits of a decoding token, in order

Tokens that decode are tiles of one token, whose keys are cut into splits of one length, so that a long text
fills the device and a result does not depend on the neighbours. Prompts have tiles of many tokens and one
split. Only tiles of keys that some token does not see are masked. Heads of a group share their keys, so they
are rows of one product. Offsets into the cache are of 64 bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..reference import causal_mask
from . import tuning
from .dot import LEAST_ROWS, UPCAST

if TYPE_CHECKING:
    from ..reference.paged_attention import Tiles
    from .configs import Attention

HIDDEN = tl.constexpr(causal_mask.HIDDEN)
LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def asked(
    query_ptr, first, start, count, head, first_row,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
    ROWS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Of some rows of a tile: queries, positions, whether there is one, and its place among all queries."""
    at, row = tl.arange(0, PADDED), first_row + tl.arange(0, ROWS)
    asking = row < count * GROUP
    own = ((first + row // GROUP) * KV_HEADS + head) * GROUP + row % GROUP
    inside = asking[:, None] & (at < WIDTH)[None, :]
    query = tl.load(query_ptr + own[:, None] * WIDTH + at[None, :], mask=inside, other=0.0)
    if UPCAST:
        query = query.to(tl.float32)
    return query, start + row // GROUP, asking, own


@triton.jit
def attend_keys(
    query, top, total, mixed, position, first_key, high, window, key_ptr, value_ptr, table_ptr, head,
    KV_HEADS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr,
    KEYS: tl.constexpr, WINDOWED: tl.constexpr, MASKED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Takes KEYS more keys into the running maximum, the sum and the mixed values of every row."""
    at = tl.arange(0, PADDED)
    key = first_key + tl.arange(0, KEYS)
    there = key < high
    page = tl.load(table_ptr + key // BLOCK, mask=there, other=0).to(tl.int64)
    place = ((page * KV_HEADS + head) * BLOCK + key % BLOCK) * WIDTH
    inside = there[:, None] & (at < WIDTH)[None, :]
    keys = tl.load(key_ptr + place[:, None] + at[None, :], mask=inside, other=0.0)
    values = tl.load(value_ptr + place[:, None] + at[None, :], mask=inside, other=0.0)
    if UPCAST:
        keys, values = keys.to(tl.float32), values.to(tl.float32)
    scores = tl.dot(query, tl.trans(keys), input_precision="ieee") * LOG2E
    if MASKED:
        seen = (key[None, :] <= position[:, None]) & there[None, :]
        if WINDOWED:
            seen = seen & (key[None, :] > position[:, None] - window)
        scores = tl.where(seen, scores, HIDDEN)
    higher = tl.maximum(top, tl.max(scores, axis=1))
    shares = tl.exp2(scores - higher[:, None])
    if MASKED:
        shares = tl.where(seen, shares, 0.0)
    fade = tl.exp2(top - higher)
    total = total * fade + tl.sum(shares, axis=1)
    mixed = mixed * fade[:, None] + tl.dot(shares.to(values.dtype), values, input_precision="ieee")
    return higher, total, mixed


@triton.jit(do_not_specialize=["width", "splits", "window"])
def attend_kernel(
    query_ptr, key_ptr, value_ptr, table_ptr, first_ptr, start_ptr, count_ptr, row_ptr,
    out_ptr, top_ptr, total_ptr, width, splits, window,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, SPLIT: tl.constexpr,
    WINDOWED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """width: pages of a table's row. SPLIT 0: one split has all keys, and the result is final."""
    tile, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first, start = tl.load(first_ptr + tile).to(tl.int64), tl.load(start_ptr + tile)
    count = tl.load(count_ptr + tile)
    end = start + count
    low = start * 0
    high = end
    if WINDOWED:
        low = tl.maximum(start - window + 1, 0) // KEYS * KEYS
    if SPLIT > 0:
        low = tl.maximum(low, split * SPLIT)
        high = tl.minimum(end, split * SPLIT + SPLIT)
    if low >= high:
        return
    table = table_ptr + tl.load(row_ptr + tile).to(tl.int64) * width
    at, row = tl.arange(0, PADDED), tl.arange(0, ROWS)
    query, position, asking, own = asked(
        query_ptr, first, start, count, head, 0, KV_HEADS, GROUP, WIDTH, PADDED, ROWS, UPCAST
    )
    inside = asking[:, None] & (at < WIDTH)[None, :]
    top = tl.full([ROWS], HIDDEN, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, PADDED], tl.float32)
    clear = low
    if not WINDOWED:  # whole tiles of keys that every token sees
        clear = low + tl.maximum(tl.minimum(high, start + 1) - low, 0) // KEYS * KEYS
        for first_key in range(low, clear, KEYS):
            top, total, mixed = attend_keys(
                query, top, total, mixed, position, first_key, high, window, key_ptr, value_ptr, table, head,
                KV_HEADS, WIDTH, PADDED, BLOCK, KEYS, WINDOWED, False, UPCAST,
            )  # fmt: skip
    for first_key in range(clear, high, KEYS):
        top, total, mixed = attend_keys(
            query, top, total, mixed, position, first_key, high, window, key_ptr, value_ptr, table, head,
            KV_HEADS, WIDTH, PADDED, BLOCK, KEYS, WINDOWED, True, UPCAST,
        )  # fmt: skip
    if SPLIT > 0:
        part = ((tile.to(tl.int64) * KV_HEADS + head) * splits + split) * GROUP + row
        tl.store(top_ptr + part, top, mask=asking)
        tl.store(total_ptr + part, total, mask=asking)
        tl.store(out_ptr + part[:, None] * WIDTH + at[None, :], mixed, mask=inside)
    else:
        total = tl.where(asking, total, 1.0)
        tl.store(out_ptr + own[:, None] * WIDTH + at[None, :], mixed / total[:, None], mask=inside)


@triton.jit
def merged(top, total, mixed, peak, weight, values):
    """The state of what was seen, and that of more: maximum, sum and mixed values of every row."""
    higher = tl.maximum(top, peak)
    fade, share = tl.exp2(top - higher), tl.exp2(peak - higher)
    return higher, total * fade + share * weight, mixed * fade[:, None] + share[:, None] * values


@triton.jit(do_not_specialize=["splits", "window"])
def merge_kernel(
    part_ptr, top_ptr, total_ptr, first_ptr, start_ptr, out_ptr, splits, window,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_PADDED: tl.constexpr, WIDTH: tl.constexpr,
    PADDED: tl.constexpr, KEYS: tl.constexpr, SPLIT: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    tile, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first, start = tl.load(first_ptr + tile).to(tl.int64), tl.load(start_ptr + tile)
    at, row = tl.arange(0, PADDED), tl.arange(0, GROUP_PADDED)
    asking = row < GROUP
    inside = asking[:, None] & (at < WIDTH)[None, :]
    top = tl.full([GROUP_PADDED], HIDDEN, tl.float32)
    total = tl.zeros([GROUP_PADDED], tl.float32)
    mixed = tl.zeros([GROUP_PADDED, PADDED], tl.float32)
    low = start * 0
    if WINDOWED:
        low = tl.maximum(start - window + 1, 0) // KEYS * KEYS // SPLIT
    for split in range(low, start // SPLIT + 1):
        part = ((tile * KV_HEADS + head) * splits + split) * GROUP + row
        peak = tl.load(top_ptr + part, mask=asking, other=HIDDEN)
        weight = tl.load(total_ptr + part, mask=asking, other=0.0)
        values = tl.load(part_ptr + part[:, None] * WIDTH + at[None, :], mask=inside, other=0.0)
        top, total, mixed = merged(top, total, mixed, peak, weight, values)
    total = tl.where(asking, total, 1.0)
    own = (first * KV_HEADS + head) * GROUP + row
    tl.store(out_ptr + own[:, None] * WIDTH + at[None, :], mixed / total[:, None], mask=inside)


def constants(queries: Tensor, cache: Tensor, window: int | None, tuned: Attention) -> dict[str, int]:
    """What the launches of an attention have in common that is compiled in."""
    kv_heads, width = cache.shape[2], queries.shape[2]
    return {
        "KV_HEADS": kv_heads,
        "GROUP": queries.shape[1] // kv_heads,
        "WIDTH": width,
        "PADDED": max(16, triton.next_power_of_2(width)),
        "KEYS": 2 * tuned.keys // cache.itemsize,
        "WINDOWED": window is not None,
    }


def paged_attention(
    queries: Tensor,
    cache: Tensor,
    tables: Tensor,
    tiles: Tiles,
    window: int | None = None,
    out: Tensor | None = None,
    tuned: Attention | None = None,
) -> Tensor:
    """See `kernels.reference.paged_attention.paged_attention`; tiles of one token are decoded in splits.

    Only the tiles' tokens are written to `out`, which is as the queries are. tuned: how it is launched,
    None for what the device is launched with.
    """
    tuned = tuned or tuning.of(queries.device).attention
    common, block = constants(queries, cache, window, tuned), cache.shape[3]
    kv_heads, group, width = common["KV_HEADS"], common["GROUP"], common["WIDTH"]
    decoding = tiles.size == 1
    splits = triton.cdiv(tiles.longest, tuned.split) if decoding else 1
    out = torch.empty_like(queries) if out is None else out
    part, top, total = out, out, out
    if decoding:
        part = torch.empty(len(tiles.first), kv_heads, splits, group, width, device=queries.device)
        top, total = (torch.empty(part.shape[:-1], device=queries.device) for _ in range(2))
    rows = max(LEAST_ROWS, triton.next_power_of_2(group * tiles.size))
    attend_kernel[(len(tiles.first), kv_heads, splits)](
        queries, cache[0], cache[1], tables, tiles.first, tiles.start, tiles.count, tiles.table,
        part, top, total, tables.shape[1], splits, window or 0,
        **common, BLOCK=block, ROWS=rows, SPLIT=tuned.split if decoding else 0, UPCAST=UPCAST,
        num_warps=tuned.warps if decoding else tuned.prompt_warps, num_stages=tuned.stages,
    )  # fmt: skip
    if decoding:
        merge_kernel[(len(tiles.first), kv_heads)](
            part, top, total, tiles.first, tiles.start, out, splits, window or 0,
            **common, GROUP_PADDED=triton.next_power_of_2(group), SPLIT=tuned.split,
        )  # fmt: skip
    return out
