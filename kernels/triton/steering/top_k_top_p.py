"""Thresholds without a sort: the largest t for which enough of a row lies at or above it.

    survey  (request, split)   how much lies at or above each of 15 values below the row's largest
    survey  (request, split)   where many may lie between two of them, at or above each of 15 between these
    gather  (request, split)   the values between the two that the threshold lies between
    halve   (request)          the threshold among these

Enough is a count (top-k) or a mass (top-p, and Linear Alignment's nucleus of its preference branch). A mass
is a sum of integers, 2⁴⁰ times the probability relative to the top token, and so the same in any order.
Halving works on the ordered integers that float32 values are, so that it ends at one value, exactly. All ties
are kept. Nothing is asked of the host, and the number of launches is fixed. Of a row that is nearly one value
all lies between two that are tried, and `halve` reads it again and again, 1,024 at a time.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...distributed.vocab_parallel import UNIT as UNIT_OF_REFERENCE

if TYPE_CHECKING:
    from ...steering.state import Groups

BINS, AT_ONCE, TILE = tl.constexpr(16), tl.constexpr(2), tl.constexpr(1024)
FEW = tl.constexpr(2048)
"""Values that one program halves among as they are."""
NONE = tl.constexpr(1 << 40)
"""In place of the lowest value tried: there was no second survey."""
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
def value_of(keys):
    """The float32 values whose ordered integers these are."""
    return (keys ^ ((keys >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def place_of(first_ptr, count_ptr, group, KIND: tl.constexpr):
    """The row that is searched: a request's, or the logits of its last branch."""
    place = group
    if KIND == NUCLEUS:
        place = tl.load(first_ptr + group) + tl.load(count_ptr + group) - 1
    return place


@triton.jit
def part_of(rows_ptr, place, split, vocab, named, KIND: tl.constexpr, SPLIT: tl.constexpr):
    """A split's values, and which of them there are; what is no number is −∞."""
    token = split * SPLIT + tl.arange(0, SPLIT)
    inside = token < (named if KIND == NUCLEUS else vocab)
    values = tl.load(rows_ptr + place * vocab + token, mask=inside, other=float("-inf")).to(tl.float32)
    return tl.where(values == values, values, float("-inf")), inside


@triton.jit
def top_of(tops_ptr, place, splits, S_PAD: tl.constexpr):
    """The largest value of a row."""
    part = tl.arange(0, S_PAD)
    return tl.max(tl.load(tops_ptr + place * splits + part, mask=part < splits, other=float("-inf")), axis=0)


@triton.jit
def unit_of(tops_ptr, place, top, temperature, splits, KIND: tl.constexpr, S_PAD: tl.constexpr):
    """What values are tried in units of: the temperature that masses have; of counts, how far parts' tops lie
    apart where that is much, as at a large strength."""
    unit = temperature
    if KIND == TOP_K:
        part = tl.arange(0, S_PAD)
        tops = tl.load(tops_ptr + place * splits + part, mask=part < splits, other=float("-inf"))
        lowest = tl.min(tl.where(tops > float("-inf"), tops, top), axis=0)
        unit = tl.maximum(tl.where(lowest < top, top - lowest, 0.0) / 8, 1.0)
    return unit


@triton.jit
def tried(index, top, unit):
    """The ordered integers of the values to try, int64: the lowest of all, then rising to just below the top.

    They lie the further apart the further they are below it.
    """
    back = (index - BINS).to(tl.float32)
    value = top + unit * back * (0.35 - 0.1 * back)
    keys = ordered(tl.where(value == value, value, float("-inf"))).to(tl.int64)
    return tl.where(index == 0, LOWEST, keys)


@triton.jit
def weighed(values, top, temperature, KIND: tl.constexpr):
    """What each value counts: 1, or its integer mass."""
    if KIND == TOP_K:
        weights = tl.full(values.shape, 1, tl.int32)
    else:
        below = tl.where(values >= top, 0.0, values - top)  # also where both are infinite
        weights = (tl.exp(below / temperature) * UNIT).to(tl.int64)
    return weights


@triton.jit
def bracket(bounds_ptr, sums_ptr, target, group, splits, S_PAD: tl.constexpr):
    """The last value tried at or above which there is enough, and the next; how much lies at or above each.

    Values are ordered integers; they are read, as another kernel may round what it computes otherwise.
    """
    split, index = tl.arange(0, S_PAD), tl.arange(0, BINS)
    places = group * BINS * splits + index[:, None] * splits + split[None, :]
    sums = tl.sum(tl.load(sums_ptr + places, mask=split[None, :] < splits, other=0), axis=1)
    chosen = tl.max(tl.where((sums.to(tl.float64) >= target) | (index == 0), index, 0), axis=0)
    bounds = tl.load(bounds_ptr + group * BINS + index)
    low = tl.sum(tl.where(index == chosen, bounds, 0), axis=0)
    high = tl.sum(tl.where(index == chosen + 1, bounds, 0), axis=0)
    held = tl.sum(tl.where(index == chosen, sums, 0), axis=0)
    above = tl.sum(tl.where(index == chosen + 1, sums, 0), axis=0)
    return low, tl.where(chosen == BINS - 1, BEYOND, high), held, above


@triton.jit
def target_of(sums_ptr, limit, group, splits, KIND: tl.constexpr, S_PAD: tl.constexpr):
    """How much is enough: the limit of a count; of a mass its share of all, which lies above the lowest."""
    target = limit
    if KIND != TOP_K:
        part = tl.arange(0, S_PAD)
        mass = tl.load(sums_ptr + group * BINS * splits + part, mask=part < splits, other=0)
        target = limit * tl.sum(mass, axis=0).to(tl.float64)
    return target


@triton.jit
def closer(
    bounds_ptr, sums_ptr, finer_bounds_ptr, finer_ptr, limit, group, splits,
    KIND: tl.constexpr, S_PAD: tl.constexpr,
):  # fmt: skip
    """The bracket after both surveys, how much lies at or above the higher of them, and the target."""
    target = target_of(sums_ptr, limit, group, splits, KIND, S_PAD)
    low, high, _, above = bracket(bounds_ptr, sums_ptr, target, group, splits, S_PAD)
    if tl.load(finer_bounds_ptr + group * BINS) != NONE:
        low, upper, _, over = bracket(finer_bounds_ptr, finer_ptr, target, group, splits, S_PAD)
        above = tl.where(upper == BEYOND, above, over)
        high = tl.where(upper == BEYOND, high, upper)
    return low, high, above, target


@triton.jit
def between(low, high, index, top):
    """The ordered integer so many sixteenths of the way, by value; from −∞ on, by the integers themselves."""
    start = value_of(low.to(tl.int32))
    end = tl.where(high == BEYOND, top, value_of(high.to(tl.int32)))
    value = start + (end - start) * (index.to(tl.float32) / 16)
    keys = ordered(tl.where(value == value, value, start)).to(tl.int64)
    keys = tl.where(
        low == LOWEST, low + (((high - low) * index) >> 4), tl.minimum(tl.maximum(keys, low), high)
    )
    return tl.where(index == 0, low, keys)


@triton.jit(do_not_specialize=["splits", "named"])
def survey_kernel(
    rows_ptr, tops_ptr, table_ptr, first_ptr, count_ptr, limits_ptr, temperature_ptr, outer_ptr,
    first_bounds_ptr, first_sums_ptr, bounds_ptr, sums_ptr, vocab, named, splits,
    KIND: tl.constexpr, OUTER: tl.constexpr, FINER: tl.constexpr, S_PAD: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """rows: logits for a nucleus, else scores [groups, vocab]; tops: their max by split; limits [groups, 3]:
    p or k of each kind, 0 is off. sums [groups, 16, splits].

    With OUTER mass is counted among the tokens at or above thresholds that were found before [groups].
    FINER: the second survey, after the first; bounds [groups, 16]: what is tried, as ordered integers.
    """
    group, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    limit = tl.load(limits_ptr + group * 3 + KIND)
    if limit > 0:
        place = place_of(first_ptr, count_ptr, group, KIND)
        top = top_of(tops_ptr, place, splits, S_PAD)
        temperature = tl.load(temperature_ptr + tl.load(table_ptr + group)).to(tl.float32)
        wanted = limit > 0
        if FINER:
            target = target_of(first_sums_ptr, limit, group, splits, KIND, S_PAD)
            low, high, held, above = bracket(first_bounds_ptr, first_sums_ptr, target, group, splits, S_PAD)
            # as many as there can be if all of them weigh as little as the lowest
            lightest = tl.full([], 1.0, tl.float32)
            if KIND != TOP_K:
                below = tl.minimum(value_of(low.to(tl.int32)) - top, 0.0)
                lightest = tl.exp(below / temperature) * UNIT
            wanted = (held - above).to(tl.float32) > FEW * lightest
            if wanted == 0:
                tl.store(bounds_ptr + group * BINS, NONE, mask=split == 0)
        if wanted:
            values, _ = part_of(rows_ptr, place, split, vocab, named, KIND, SPLIT)
            keys, weights = ordered(values), weighed(values, top, temperature, KIND)
            highest = tl.load(tops_ptr + place * splits + split)
            if OUTER:
                least = tl.load(outer_ptr + group)
                weights = tl.where(values >= least, weights, 0)
                highest = tl.where(highest >= least, highest, float("-inf"))
            unit = unit_of(tops_ptr, place, top, temperature, splits, KIND, S_PAD)
            out = sums_ptr + group * BINS * splits + split
            for start in range(0, BINS, AT_ONCE):
                index = start + tl.arange(0, AT_ONCE)
                trial = between(low, high, index, top) if FINER else tried(index, top, unit)
                if split == 0:
                    tl.store(bounds_ptr + group * BINS + index, trial)
                bounds = trial.to(tl.int32)
                sums = tl.zeros([AT_ONCE], tl.int64)
                if ordered(highest) >= tl.min(bounds, axis=0):
                    reached = tl.where(keys[None, :] >= bounds[:, None], weights[None, :], 0)
                    sums = tl.sum(reached, axis=1).to(tl.int64)
                tl.store(out + index * splits, sums)


@triton.jit(do_not_specialize=["splits", "named"])
def gather_kernel(
    rows_ptr, tops_ptr, table_ptr, first_ptr, count_ptr, limits_ptr, bounds_ptr, sums_ptr,
    finer_bounds_ptr, finer_ptr, held_ptr, found_ptr, vocab, named, splits,
    KIND: tl.constexpr, S_PAD: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """held [groups, splits, SPLIT]: the ordered integers in the bracket; found [groups, splits]: how many."""
    group, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    limit = tl.load(limits_ptr + group * 3 + KIND)
    if limit > 0:
        place = place_of(first_ptr, count_ptr, group, KIND)
        low, high, _, _ = closer(
            bounds_ptr, sums_ptr, finer_bounds_ptr, finer_ptr, limit, group, splits, KIND, S_PAD
        )
        at = group * splits + split
        found = split * 0
        if ordered(tl.load(tops_ptr + place * splits + split)) >= low:
            values, inside = part_of(rows_ptr, place, split, vocab, named, KIND, SPLIT)
            keys = ordered(values)
            wanted = inside & (keys >= low.to(tl.int32)) & (keys < high)
            number = tl.cumsum(wanted.to(tl.int32), axis=0)
            tl.store(held_ptr + at * SPLIT + number - 1, keys, mask=wanted)
            found = tl.max(number, axis=0)
        tl.store(found_ptr + at, found)


@triton.jit
def taken(held, there, least, top, temperature, KIND: tl.constexpr):
    """Ordered integers that were gathered, and what each counts, 0 where there is none."""
    keys = tl.load(held, mask=there, other=0)
    values = value_of(keys)
    weights = weighed(values, top, temperature, KIND)
    return keys, tl.where(there & (values >= least), weights, 0)


@triton.jit
def halve_kernel(
    tops_ptr, table_ptr, first_ptr, count_ptr, limits_ptr, temperature_ptr, outer_ptr, bounds_ptr,
    sums_ptr, finer_bounds_ptr, finer_ptr, held_ptr, found_ptr, threshold_ptr, splits,
    KIND: tl.constexpr, OUTER: tl.constexpr, S_PAD: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """threshold [groups]: −∞ where the request does not have this filter."""
    EACH: tl.constexpr = TILE // S_PAD
    group = tl.program_id(0).to(tl.int64)
    limit = tl.load(limits_ptr + group * 3 + KIND)
    threshold = tl.zeros([], tl.float32) + float("-inf")
    if limit > 0:
        place = place_of(first_ptr, count_ptr, group, KIND)
        top = top_of(tops_ptr, place, splits, S_PAD)
        temperature = tl.load(temperature_ptr + tl.load(table_ptr + group)).to(tl.float32)
        low, high, above, target = closer(
            bounds_ptr, sums_ptr, finer_bounds_ptr, finer_ptr, limit, group, splits, KIND, S_PAD
        )
        least = tl.zeros([], tl.float32) + float("-inf")
        if OUTER:
            least = tl.load(outer_ptr + group)
        split, number = tl.arange(0, TILE) // EACH, tl.arange(0, TILE) % EACH
        found = tl.load(found_ptr + group * splits + split, mask=split < splits, other=0)
        most = tl.max(found, axis=0)
        held = held_ptr + (group * splits + split) * SPLIT + number
        nearest, its = taken(held, number < found, least, top, temperature, KIND)
        while high - low > 1:
            middle = low + ((high - low) >> 1)
            total = above + tl.sum(tl.where(nearest >= middle, its, 0), axis=0)
            for start in range(EACH, most, EACH):
                keys, weights = taken(held + start, start + number < found, least, top, temperature, KIND)
                total += tl.sum(tl.where(keys >= middle, weights, 0), axis=0)
            reached = total.to(tl.float64) >= target
            low = tl.where(reached, middle, low)
            high = tl.where(reached, high, middle)
        threshold = value_of(low.to(tl.int32))
    tl.store(threshold_ptr + group, threshold)


def search(
    kind: Kind,
    rows: Tensor,
    tops: Tensor,
    groups: Groups,
    limits: Tensor,
    temperature: Tensor,
    named: int,
    split: int,
    outer: Tensor | None = None,
) -> Tensor:
    """The thresholds of one kind, float32 [groups].

    rows, tops: see `survey_kernel`. limits [groups, 3] float64. temperature: the column of the table. named:
    ids at or beyond it are in no nucleus. split: the length that the vocabulary is split in, a power of two.
    outer: thresholds below which nothing counts.
    """
    size, (vocab, splits) = len(groups.table), (rows.shape[1], tops.shape[1])
    first, finer = (
        [
            torch.empty(size, BINS.value, *each, dtype=torch.int64, device=rows.device)
            for each in ((), (splits,))
        ]
        for _ in range(2)
    )
    held = torch.empty(size, splits, split, dtype=torch.int32, device=rows.device)
    found = torch.empty(size, splits, dtype=torch.int32, device=rows.device)
    thresholds = torch.empty(size, device=rows.device)
    where = groups.table, groups.first, groups.count, limits
    below = thresholds if outer is None else outer
    common = {"KIND": int(kind), "S_PAD": triton.next_power_of_2(splits), "SPLIT": split}
    warps = max(split // 512, 1)
    for survey in (first, finer):
        survey_kernel[(size, splits)](
            rows, tops, *where, temperature, below, *first, *survey, vocab, named, splits,
            OUTER=outer is not None, FINER=survey is finer, **common, num_warps=warps,
        )  # fmt: skip
    gather_kernel[(size, splits)](
        rows, tops, *where, *first, *finer, held, found, vocab, named, splits, **common, num_warps=warps,
    )  # fmt: skip
    halve_kernel[(size,)](
        tops, *where, temperature, below, *first, *finer, held, found, thresholds, splits,
        OUTER=outer is not None, **common, num_warps=4,
    )  # fmt: skip
    return thresholds
