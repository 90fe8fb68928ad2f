"""Attention by which a token's bits are its own: decoded or in a prompt, however cut, beside any others.

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

from . import tuning
from .attention import HIDDEN, asked, attend_keys, constants, merge_kernel, merged
from .dot import LEAST_ROWS, UPCAST

if TYPE_CHECKING:
    from ..reference.paged_attention import Tiles
    from .configs import Attention


@triton.jit(do_not_specialize=["width", "blocks", "parts", "each", "window"])
def attend_splits_kernel(
    query_ptr, key_ptr, value_ptr, table_ptr, first_ptr, start_ptr, count_ptr, row_ptr,
    out_ptr, part_ptr, top_ptr, total_ptr, width, blocks, parts, each, window,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, SPLIT: tl.constexpr,
    WINDOWED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """width: pages of a table's row. blocks: programs that share a tile's rows. parts 1: the result is final;
    else each part's state is stored.
    """
    tile, head, part = tl.program_id(0), tl.program_id(1) // blocks, tl.program_id(2)
    first_row = tl.program_id(1) % blocks * ROWS
    first, start = tl.load(first_ptr + tile).to(tl.int64), tl.load(start_ptr + tile)
    count = tl.load(count_ptr + tile)
    end = start + tl.minimum(count, (first_row + ROWS - 1) // GROUP + 1)
    low = start * 0
    if WINDOWED:
        low = tl.maximum(start - window + 1, 0) // KEYS * KEYS
    first_split = tl.maximum(low // SPLIT, part * each)
    last_split = tl.minimum((end + SPLIT - 1) // SPLIT, part * each + each)
    if first_split >= last_split or first_row >= count * GROUP:
        return
    table = table_ptr + tl.load(row_ptr + tile).to(tl.int64) * width
    at, row = tl.arange(0, PADDED), first_row + tl.arange(0, ROWS)
    query, position, asking, own = asked(
        query_ptr, first, start, count, head, first_row, KV_HEADS, GROUP, WIDTH, PADDED, ROWS, UPCAST
    )
    top = tl.full([ROWS], HIDDEN, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    mixed = tl.zeros([ROWS, PADDED], tl.float32)
    for split in range(first_split, last_split):
        peak = tl.full([ROWS], HIDDEN, tl.float32)
        weight = tl.zeros([ROWS], tl.float32)
        values = tl.zeros([ROWS, PADDED], tl.float32)
        high = tl.minimum(end, split * SPLIT + SPLIT)
        for first_key in range(tl.maximum(low, split * SPLIT), high, KEYS):
            peak, weight, values = attend_keys(
                query, peak, weight, values, position, first_key, high, window,
                key_ptr, value_ptr, table, head, KV_HEADS, WIDTH, PADDED, BLOCK, KEYS, WINDOWED, True, UPCAST,
            )  # fmt: skip
        top, total, mixed = merged(top, total, mixed, peak, weight, values)
    # stores are masked: with a branch the code for some GPUs spills
    apart = row < tl.where(parts > 1, count * GROUP, 0)
    final = row < tl.where(parts > 1, 0, count * GROUP)
    place = ((tile.to(tl.int64) * KV_HEADS + head) * parts + part) * GROUP + row
    tl.store(top_ptr + place, top, mask=apart)
    tl.store(total_ptr + place, total, mask=apart)
    within = (at < WIDTH)[None, :]
    tl.store(part_ptr + place[:, None] * WIDTH + at[None, :], mixed, mask=apart[:, None] & within)
    total = tl.where(asking, total, 1.0)
    to = out_ptr + own[:, None] * WIDTH + at[None, :]
    tl.store(to, mixed / total[:, None], mask=final[:, None] & within)


def invariant_attention(
    queries: Tensor,
    cache: Tensor,
    tables: Tensor,
    tiles: Tiles,
    window: int | None = None,
    out: Tensor | None = None,
    tuned: Attention | None = None,
) -> Tensor:
    """As `attention.paged_attention`, to the same bits for a token whatever tile it is in."""
    tuned = tuned or tuning.of(queries.device).attention
    common = constants(queries, cache, window, tuned) | {"SPLIT": tuned.split}
    kv_heads, group, width = common["KV_HEADS"], common["GROUP"], common["WIDTH"]
    splits = triton.cdiv(tiles.longest, tuned.split)
    parts = splits if tiles.size == 1 else 1
    out = torch.empty_like(queries) if out is None else out
    held = (len(tiles.first), kv_heads, parts, group) if parts > 1 else (1,)  # of one type in any case
    part = torch.empty(*held, width, device=queries.device)
    top, total = (torch.empty(held, device=queries.device) for _ in range(2))
    blocks = triton.cdiv(group * tiles.size, LEAST_ROWS)
    attend_splits_kernel[(len(tiles.first), kv_heads * blocks, parts)](
        queries, cache[0], cache[1], tables, tiles.first, tiles.start, tiles.count, tiles.table,
        out, part, top, total, tables.shape[1], blocks, parts, splits // parts, window or 0,
        **common, BLOCK=cache.shape[3], ROWS=LEAST_ROWS, UPCAST=UPCAST,
        num_warps=tuned.warps, num_stages=tuned.stages, enable_fp_fusion=False,
    )  # fmt: skip
    if parts > 1:
        merge_kernel[(len(tiles.first), kv_heads)](
            part, top, total, tiles.first, tiles.start, out, parts, window or 0,
            **common, GROUP_PADDED=triton.next_power_of_2(group), enable_fp_fusion=False,
        )  # fmt: skip
    return out
