"""Thresholds without a sort: the largest t for which enough of a row lies at or above it.

Enough is a count (top-k) or a mass (top-p, and Linear Alignment's nucleus of its preference branch). The
search runs over the ordered integers that float32 values are, whose range is at most 2³²: a sweep tries 15
thresholds at even distances, so that 8 sweeps always end at one value, exactly. A mass is a sum of integers,
2⁴⁰ times the probability relative to the top token, and therefore the same in any order. All ties are kept.

A sweep is one launch over (row, split): its prologue merges what the sweep before counted. Nothing is asked
of the host, and the number of launches is fixed.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..shard import UNIT as UNIT_OF_REFERENCE

if TYPE_CHECKING:
    from ..steer_table import Groups

Search = tuple[Tensor, Tensor]
"""What the sweeps of one search leave: brackets and sums."""
SWEEPS = 8
LAST = tl.constexpr(SWEEPS)
BINS, AT_ONCE = tl.constexpr(16), tl.constexpr(4)
UNIT = tl.constexpr(UNIT_OF_REFERENCE)
LOWEST, BEYOND = tl.constexpr(-0x7F800001), tl.constexpr(0x7F800001)  # of −∞, and one above that of ∞


class Kind(IntEnum):
    """What is searched for."""

    NUCLEUS = 0
    TOP_K = 1
    TOP_P = 2


NUCLEUS, TOP_K, TOP_P = (tl.constexpr(int(kind)) for kind in Kind)


@triton.jit
def ordered(values):
    """int32 that are ordered as the float32 values are; −0 and 0 are one."""
    bits = tl.where(values == 0, 0.0, values).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def narrow(state_ptr, sums_ptr, limit, group, groups, sweep, splits, KIND: tl.constexpr, S_PAD: tl.constexpr):
    """The bracket [low, high) of ordered integers after `sweep` sweeps, int64.

    At or above low there is enough, at or above high there is not. state [sweeps, groups, 2];
    sums [sweeps, groups, 16, splits].
    """
    low = tl.zeros([], tl.int64) + LOWEST
    high = tl.zeros([], tl.int64) + BEYOND
    if sweep > 0:
        split, index = tl.arange(0, S_PAD), tl.arange(0, BINS)
        at = state_ptr + ((sweep - 1) * groups + group) * 2
        low, high = tl.load(at), tl.load(at + 1)
        places = ((sweep - 1) * groups + group) * BINS * splits + index[:, None] * splits + split[None, :]
        sums = tl.sum(tl.load(sums_ptr + places, mask=split[None, :] < splits, other=0), axis=1)
        target = limit
        if KIND != TOP_K:
            everything = tl.load(sums_ptr + group * BINS * splits + split, mask=split < splits, other=0)
            target = limit * tl.sum(everything, axis=0).to(tl.float64)
        enough = (sums.to(tl.float64) >= target) | (index == 0)
        chosen = tl.max(tl.where(enough, index, 0), axis=0).to(tl.int64)
        width = high - low
        high = tl.where(chosen == BINS - 1, high, low + ((width * (chosen + 1)) >> 4))
        low += (width * chosen) >> 4
    return low, high


@triton.jit
def threshold(
    limits_ptr, state_ptr, sums_ptr, group, groups, splits, KIND: tl.constexpr, S_PAD: tl.constexpr
):
    """The value that a finished search found; −∞ where the request does not have this filter."""
    limit = tl.load(limits_ptr + group * 3 + KIND)
    found = tl.zeros([], tl.float32) + float("-inf")
    if limit > 0:
        low, _ = narrow(state_ptr, sums_ptr, limit, group, groups, LAST, splits, KIND, S_PAD)
        bits = low.to(tl.int32)
        found = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    return found


@triton.jit(do_not_specialize=["splits", "groups", "sweep", "named"])
def search_kernel(
    rows_ptr, tops_ptr, table_ptr, first_ptr, count_ptr, limits_ptr, temperature_ptr, outer_state_ptr,
    outer_sums_ptr, state_ptr, sums_ptr, vocab, named, splits, groups, sweep,
    KIND: tl.constexpr, OUTER: tl.constexpr, S_PAD: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """One sweep. rows: logits for a nucleus, else scores [groups, vocab]; tops: their max by split;
    limits [groups, 3]: p or k of each kind, 0 is off.

    With OUTER a search of top-k has ended, and mass is counted among the tokens that it keeps.
    """
    group, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    limit = tl.load(limits_ptr + group * 3 + KIND)
    if limit > 0:
        place = group
        if KIND == NUCLEUS:
            place = tl.load(first_ptr + group) + tl.load(count_ptr + group) - 1
        part = tl.arange(0, S_PAD)
        tops = tl.load(tops_ptr + place * splits + part, mask=part < splits, other=float("-inf"))
        top = tl.max(tops, axis=0)
        low, high = narrow(state_ptr, sums_ptr, limit, group, groups, sweep, splits, KIND, S_PAD)
        at = state_ptr + (sweep * groups + group) * 2
        tl.store(at, low, mask=split == 0)
        tl.store(at + 1, high, mask=split == 0)

        token = split * SPLIT + tl.arange(0, SPLIT)
        inside = token < (named if KIND == NUCLEUS else vocab)
        values = tl.load(rows_ptr + place * vocab + token, mask=inside, other=float("-inf")).to(tl.float32)
        values = tl.where(values == values, values, float("-inf"))
        keys = ordered(values)
        if KIND == TOP_K:
            weights = tl.full([SPLIT], 1, tl.int32)
        else:
            temperature = tl.load(temperature_ptr + tl.load(table_ptr + group)).to(tl.float32)
            below = tl.where(values >= top, 0.0, values - top)  # also where both are infinite
            weights = (tl.exp(below / temperature) * UNIT).to(tl.int64)
        if OUTER:
            least = threshold(
                limits_ptr, outer_state_ptr, outer_sums_ptr, group, groups, splits, TOP_K, S_PAD
            )
            weights = tl.where(values >= least, weights, 0)
        out = sums_ptr + (sweep * groups + group) * BINS * splits + split
        width = high - low
        for start in range(0, BINS, AT_ONCE):
            index = start + tl.arange(0, AT_ONCE)
            bounds = (low + ((width * index) >> 4)).to(tl.int32)
            above = tl.where(keys[None, :] >= bounds[:, None], weights[None, :], 0)
            tl.store(out + index * splits, tl.sum(above, axis=1).to(tl.int64))


def search(
    kind: Kind,
    rows: Tensor,
    tops: Tensor,
    groups: Groups,
    limits: Tensor,
    temperature: Tensor,
    named: int,
    split: int,
    outer: Search | None = None,
) -> Search:
    """All sweeps of one kind; `threshold` reads what they found.

    rows, tops: see `search_kernel`. limits [groups, 3] float64. temperature: the column of the table. named:
    ids at or beyond it are in no nucleus. split: the length that the vocabulary is split in, a power of two.
    """
    size, (vocab, splits) = len(groups.table), (rows.shape[1], tops.shape[1])
    state = torch.empty(SWEEPS, size, 2, dtype=torch.int64, device=rows.device)
    sums = torch.empty(SWEEPS, size, BINS.value, splits, dtype=torch.int64, device=rows.device)
    for sweep in range(SWEEPS):
        search_kernel[(size, splits)](
            rows, tops, groups.table, groups.first, groups.count, limits, temperature,
            *(outer or (state, sums)), state, sums, vocab, named, splits, size, sweep,
            KIND=int(kind), OUTER=outer is not None, S_PAD=triton.next_power_of_2(splits), SPLIT=split,
            num_warps=max(split // 512, 1),
        )  # fmt: skip
    return state, sums
