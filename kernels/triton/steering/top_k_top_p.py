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

from ...distributed.vocab_parallel import MASS_SCALE as REFERENCE_MASS_SCALE
from .columns import column, load_param

if TYPE_CHECKING:
    from ...steering.layout import RequestLayout

NUM_BOUNDS, BOUNDS_PER_PASS, BISECT_TILE = tl.constexpr(16), tl.constexpr(2), tl.constexpr(1024)
MAX_DIRECT = tl.constexpr(2048)
"""Values that one program halves among as they are."""
NO_REFINE = tl.constexpr(1 << 40)
"""In place of the lowest value tried: there was no second survey."""
MASS_SCALE = tl.constexpr(REFERENCE_MASS_SCALE)
MIN_KEY, END_KEY = tl.constexpr(-0x7F800001), tl.constexpr(0x7F800001)  # of −∞, and one above that of ∞


class ThresholdKind(IntEnum):
    """What is searched for."""

    NUCLEUS = 0
    TOP_K = 1
    TOP_P = 2


TEMPERATURE, MASK_TEMPERATURE = column("temperature"), column("mask_temperature")
NUCLEUS, TOP_K, TOP_P = (tl.constexpr(int(kind)) for kind in ThresholdKind)


@triton.jit
def float_to_key(values):
    """int32 that are ordered as the float32 values are; −0 and 0 are one."""
    bits = tl.where(values == 0, 0.0, values).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def key_to_float(keys):
    """The float32 values whose ordered integers these are."""
    return (keys ^ ((keys >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def get_row(row_start_ptr, num_rows_ptr, req_idx, KIND: tl.constexpr):
    """The row that is searched: a request's, or the logits of its last branch."""
    row = req_idx
    if KIND == NUCLEUS:
        row = tl.load(row_start_ptr + req_idx) + tl.load(num_rows_ptr + req_idx) - 1
    return row


@triton.jit
def load_temperature(params_ptr, state_row, KIND: tl.constexpr):
    """The temperature of the mass that is searched for."""
    if KIND == NUCLEUS:
        temperature = load_param(params_ptr, state_row, MASK_TEMPERATURE)
    else:
        temperature = load_param(params_ptr, state_row, TEMPERATURE)
    return temperature.to(tl.float32)


@triton.jit
def load_split(
    values_ptr, row, split_idx, vocab_size, valid_vocab, KIND: tl.constexpr, BLOCK_V: tl.constexpr
):
    """A split's values, and which of them there are; what is no number is −∞."""
    offs_v = split_idx * BLOCK_V + tl.arange(0, BLOCK_V)
    mask_v = offs_v < (valid_vocab if KIND == NUCLEUS else vocab_size)
    values = tl.load(values_ptr + row * vocab_size + offs_v, mask=mask_v, other=float("-inf")).to(tl.float32)
    return tl.where(values == values, values, float("-inf")), mask_v


@triton.jit
def load_row_max(split_max_ptr, row, num_splits, BLOCK_S: tl.constexpr):
    """The largest value of a row."""
    offs_s = tl.arange(0, BLOCK_S)
    return tl.max(
        tl.load(split_max_ptr + row * num_splits + offs_s, mask=offs_s < num_splits, other=float("-inf")),
        axis=0,
    )


@triton.jit
def bound_spacing(
    split_max_ptr, row, row_max, temperature, num_splits, KIND: tl.constexpr, BLOCK_S: tl.constexpr
):
    """What values are tried in units of: the temperature that masses have; of counts, how far parts' tops lie
    apart where that is much, as at a large strength."""
    spacing = temperature
    if KIND == TOP_K:
        offs_s = tl.arange(0, BLOCK_S)
        split_maxes = tl.load(
            split_max_ptr + row * num_splits + offs_s, mask=offs_s < num_splits, other=float("-inf")
        )
        min_split_max = tl.min(tl.where(split_maxes > float("-inf"), split_maxes, row_max), axis=0)
        spacing = tl.maximum(tl.where(min_split_max < row_max, row_max - min_split_max, 0.0) / 8, 1.0)
    return spacing


@triton.jit
def coarse_bounds(bound_idx, row_max, spacing):
    """The ordered integers of the values to try, int64: the lowest of all, then rising to just below the top.

    They lie the further apart the further they are below it.
    """
    steps_back = (bound_idx - NUM_BOUNDS).to(tl.float32)
    value = row_max + spacing * steps_back * (0.35 - 0.1 * steps_back)
    keys = float_to_key(tl.where(value == value, value, float("-inf"))).to(tl.int64)
    return tl.where(bound_idx == 0, MIN_KEY, keys)


@triton.jit
def token_mass(values, row_max, temperature, KIND: tl.constexpr):
    """What each value counts: 1, or its integer mass."""
    if KIND == TOP_K:
        mass = tl.full(values.shape, 1, tl.int32)
    else:
        log_ratio = tl.where(values >= row_max, 0.0, values - row_max)  # also where both are infinite
        mass = (tl.exp(log_ratio / temperature) * MASS_SCALE).to(tl.int64)
    return mass


@triton.jit
def find_bracket(bounds_ptr, sums_ptr, target, req_idx, num_splits, BLOCK_S: tl.constexpr):
    """The last value tried at or above which there is enough, and the next; how much lies at or above each.

    Values are ordered integers; they are read, as another kernel may round what it computes otherwise.
    """
    offs_s, bound_idx = tl.arange(0, BLOCK_S), tl.arange(0, NUM_BOUNDS)
    offs = req_idx * NUM_BOUNDS * num_splits + bound_idx[:, None] * num_splits + offs_s[None, :]
    sums = tl.sum(tl.load(sums_ptr + offs, mask=offs_s[None, :] < num_splits, other=0), axis=1)
    lo_idx = tl.max(tl.where((sums.to(tl.float64) >= target) | (bound_idx == 0), bound_idx, 0), axis=0)
    bounds = tl.load(bounds_ptr + req_idx * NUM_BOUNDS + bound_idx)
    lo = tl.sum(tl.where(bound_idx == lo_idx, bounds, 0), axis=0)
    hi = tl.sum(tl.where(bound_idx == lo_idx + 1, bounds, 0), axis=0)
    mass_lo = tl.sum(tl.where(bound_idx == lo_idx, sums, 0), axis=0)
    mass_hi = tl.sum(tl.where(bound_idx == lo_idx + 1, sums, 0), axis=0)
    return lo, tl.where(lo_idx == NUM_BOUNDS - 1, END_KEY, hi), mass_lo, mass_hi


@triton.jit
def load_target(sums_ptr, limit, req_idx, num_splits, KIND: tl.constexpr, BLOCK_S: tl.constexpr):
    """How much is enough: the limit of a count; of a mass its share of all, which lies above the lowest."""
    target = limit
    if KIND != TOP_K:
        offs_s = tl.arange(0, BLOCK_S)
        mass = tl.load(
            sums_ptr + req_idx * NUM_BOUNDS * num_splits + offs_s, mask=offs_s < num_splits, other=0
        )
        target = limit * tl.sum(mass, axis=0).to(tl.float64)
    return target


@triton.jit
def refine_bracket(
    coarse_bounds_ptr, coarse_sums_ptr, fine_bounds_ptr, fine_sums_ptr, limit, req_idx, num_splits,
    KIND: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """The bracket after both surveys, how much lies at or above the higher of them, and the target."""
    target = load_target(coarse_sums_ptr, limit, req_idx, num_splits, KIND, BLOCK_S)
    lo, hi, _, mass_hi = find_bracket(
        coarse_bounds_ptr, coarse_sums_ptr, target, req_idx, num_splits, BLOCK_S
    )
    if tl.load(fine_bounds_ptr + req_idx * NUM_BOUNDS) != NO_REFINE:
        lo, fine_hi, _, fine_mass_hi = find_bracket(
            fine_bounds_ptr, fine_sums_ptr, target, req_idx, num_splits, BLOCK_S
        )
        mass_hi = tl.where(fine_hi == END_KEY, mass_hi, fine_mass_hi)
        hi = tl.where(fine_hi == END_KEY, hi, fine_hi)
    return lo, hi, mass_hi, target


@triton.jit
def fine_bounds(lo, hi, bound_idx, row_max):
    """The ordered integer so many sixteenths of the way, by value; from −∞ on, by the integers themselves."""
    lo_value = key_to_float(lo.to(tl.int32))
    hi_value = tl.where(hi == END_KEY, row_max, key_to_float(hi.to(tl.int32)))
    value = lo_value + (hi_value - lo_value) * (bound_idx.to(tl.float32) / 16)
    keys = float_to_key(tl.where(value == value, value, lo_value)).to(tl.int64)
    keys = tl.where(lo == MIN_KEY, lo + (((hi - lo) * bound_idx) >> 4), tl.minimum(tl.maximum(keys, lo), hi))
    return tl.where(bound_idx == 0, lo, keys)


@triton.jit(do_not_specialize=["num_splits", "valid_vocab"])
def count_ge_kernel(
    values_ptr, split_max_ptr, state_rows_ptr, row_start_ptr, num_rows_ptr, truncation_ptr, params_ptr,
    prior_ptr,
    coarse_bounds_ptr, coarse_sums_ptr, bounds_ptr, sums_ptr, vocab_size, valid_vocab, num_splits,
    KIND: tl.constexpr, HAS_PRIOR: tl.constexpr, IS_FINE: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """rows: logits for a nucleus, else scores [groups, vocab]; tops: their max by split; limits [groups, 3]:
    p or k of each kind, 0 is off. sums [groups, 16, splits].

    With OUTER mass is counted among the tokens at or above thresholds that were found before [groups].
    IS_FINE: the second survey, after the first; bound_keys [groups, 16]: what is tried, as ordered integers.
    """
    req_idx, split_idx = tl.program_id(0).to(tl.int64), tl.program_id(1)
    limit = tl.load(truncation_ptr + req_idx * 3 + KIND)
    if limit > 0:
        row = get_row(row_start_ptr, num_rows_ptr, req_idx, KIND)
        row_max = load_row_max(split_max_ptr, row, num_splits, BLOCK_S)
        temperature = load_temperature(params_ptr, tl.load(state_rows_ptr + req_idx), KIND)
        is_active = limit > 0
        if IS_FINE:
            target = load_target(coarse_sums_ptr, limit, req_idx, num_splits, KIND, BLOCK_S)
            lo, hi, mass_lo, mass_hi = find_bracket(
                coarse_bounds_ptr, coarse_sums_ptr, target, req_idx, num_splits, BLOCK_S
            )
            # as many as there can be if all of them weigh as little as the lowest
            min_mass = tl.full([], 1.0, tl.float32)
            if KIND != TOP_K:
                log_ratio = tl.minimum(key_to_float(lo.to(tl.int32)) - row_max, 0.0)
                min_mass = tl.exp(log_ratio / temperature) * MASS_SCALE
            is_active = (mass_lo - mass_hi).to(tl.float32) > MAX_DIRECT * min_mass
            if is_active == 0:
                tl.store(bounds_ptr + req_idx * NUM_BOUNDS, NO_REFINE, mask=split_idx == 0)
        if is_active:
            values, _ = load_split(values_ptr, row, split_idx, vocab_size, valid_vocab, KIND, BLOCK_V)
            keys, mass = float_to_key(values), token_mass(values, row_max, temperature, KIND)
            split_max = tl.load(split_max_ptr + row * num_splits + split_idx)
            if HAS_PRIOR:
                prior = tl.load(prior_ptr + req_idx)
                mass = tl.where(values >= prior, mass, 0)
                split_max = tl.where(split_max >= prior, split_max, float("-inf"))
            spacing = bound_spacing(split_max_ptr, row, row_max, temperature, num_splits, KIND, BLOCK_S)
            sums_out_ptr = sums_ptr + req_idx * NUM_BOUNDS * num_splits + split_idx
            for start_bound in range(0, NUM_BOUNDS, BOUNDS_PER_PASS):
                bound_idx = start_bound + tl.arange(0, BOUNDS_PER_PASS)
                trial_bounds = (
                    fine_bounds(lo, hi, bound_idx, row_max)
                    if IS_FINE
                    else coarse_bounds(bound_idx, row_max, spacing)
                )
                if split_idx == 0:
                    tl.store(bounds_ptr + req_idx * NUM_BOUNDS + bound_idx, trial_bounds)
                bound_keys = trial_bounds.to(tl.int32)
                sums = tl.zeros([BOUNDS_PER_PASS], tl.int64)
                if float_to_key(split_max) >= tl.min(bound_keys, axis=0):
                    mass_ge = tl.where(keys[None, :] >= bound_keys[:, None], mass[None, :], 0)
                    sums = tl.sum(mass_ge, axis=1).to(tl.int64)
                tl.store(sums_out_ptr + bound_idx * num_splits, sums)


@triton.jit(do_not_specialize=["num_splits", "valid_vocab"])
def compact_kernel(
    values_ptr, split_max_ptr, state_rows_ptr, row_start_ptr, num_rows_ptr, truncation_ptr,
    coarse_bounds_ptr, coarse_sums_ptr,
    fine_bounds_ptr, fine_sums_ptr, candidates_ptr, num_candidates_ptr, vocab_size, valid_vocab, num_splits,
    KIND: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """held [groups, splits, SPLIT]: the ordered integers in the bracket; num_candidates [groups,
    num_splits]: how many.
    """
    req_idx, split_idx = tl.program_id(0).to(tl.int64), tl.program_id(1)
    limit = tl.load(truncation_ptr + req_idx * 3 + KIND)
    if limit > 0:
        row = get_row(row_start_ptr, num_rows_ptr, req_idx, KIND)
        lo, hi, _, _ = refine_bracket(
            coarse_bounds_ptr,
            coarse_sums_ptr,
            fine_bounds_ptr,
            fine_sums_ptr,
            limit,
            req_idx,
            num_splits,
            KIND,
            BLOCK_S,
        )
        split_offs = req_idx * num_splits + split_idx
        num_candidates = split_idx * 0
        if float_to_key(tl.load(split_max_ptr + row * num_splits + split_idx)) >= lo:
            values, mask_v = load_split(values_ptr, row, split_idx, vocab_size, valid_vocab, KIND, BLOCK_V)
            keys = float_to_key(values)
            in_bracket = mask_v & (keys >= lo.to(tl.int32)) & (keys < hi)
            rank = tl.cumsum(in_bracket.to(tl.int32), axis=0)
            tl.store(candidates_ptr + split_offs * BLOCK_V + rank - 1, keys, mask=in_bracket)
            num_candidates = tl.max(rank, axis=0)
        tl.store(num_candidates_ptr + split_offs, num_candidates)


@triton.jit
def load_candidates(key_ptrs, mask, prior, row_max, temperature, KIND: tl.constexpr):
    """Ordered integers that were gathered, and what each counts, 0 where there is none."""
    keys = tl.load(key_ptrs, mask=mask, other=0)
    values = key_to_float(keys)
    mass = token_mass(values, row_max, temperature, KIND)
    return keys, tl.where(mask & (values >= prior), mass, 0)


@triton.jit
def bisect_kernel(
    split_max_ptr, state_rows_ptr, row_start_ptr, num_rows_ptr, truncation_ptr, params_ptr, prior_ptr,
    coarse_bounds_ptr,
    coarse_sums_ptr, fine_bounds_ptr, fine_sums_ptr, candidates_ptr, num_candidates_ptr, threshold_ptr,
    num_splits,
    KIND: tl.constexpr, HAS_PRIOR: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """threshold [groups]: −∞ where the request does not have this filter."""
    KEYS_PER_SPLIT: tl.constexpr = BISECT_TILE // BLOCK_S
    req_idx = tl.program_id(0).to(tl.int64)
    limit = tl.load(truncation_ptr + req_idx * 3 + KIND)
    threshold = tl.zeros([], tl.float32) + float("-inf")
    if limit > 0:
        row = get_row(row_start_ptr, num_rows_ptr, req_idx, KIND)
        row_max = load_row_max(split_max_ptr, row, num_splits, BLOCK_S)
        temperature = load_temperature(params_ptr, tl.load(state_rows_ptr + req_idx), KIND)
        lo, hi, mass_hi, target = refine_bracket(
            coarse_bounds_ptr,
            coarse_sums_ptr,
            fine_bounds_ptr,
            fine_sums_ptr,
            limit,
            req_idx,
            num_splits,
            KIND,
            BLOCK_S,
        )
        prior = tl.zeros([], tl.float32) + float("-inf")
        if HAS_PRIOR:
            prior = tl.load(prior_ptr + req_idx)
        offs_s, offs_k = (
            tl.arange(0, BISECT_TILE) // KEYS_PER_SPLIT,
            tl.arange(0, BISECT_TILE) % KEYS_PER_SPLIT,
        )
        num_candidates = tl.load(
            num_candidates_ptr + req_idx * num_splits + offs_s, mask=offs_s < num_splits, other=0
        )
        max_candidates = tl.max(num_candidates, axis=0)
        key_ptrs = candidates_ptr + (req_idx * num_splits + offs_s) * BLOCK_V + offs_k
        first_keys, first_mass = load_candidates(
            key_ptrs, offs_k < num_candidates, prior, row_max, temperature, KIND
        )
        while hi - lo > 1:
            mid = lo + ((hi - lo) >> 1)
            mass_ge = mass_hi + tl.sum(tl.where(first_keys >= mid, first_mass, 0), axis=0)
            for start_k in range(KEYS_PER_SPLIT, max_candidates, KEYS_PER_SPLIT):
                keys, mass = load_candidates(
                    key_ptrs + start_k, start_k + offs_k < num_candidates, prior, row_max, temperature, KIND
                )
                mass_ge += tl.sum(tl.where(keys >= mid, mass, 0), axis=0)
            is_enough = mass_ge.to(tl.float64) >= target
            lo = tl.where(is_enough, mid, lo)
            hi = tl.where(is_enough, hi, mid)
        threshold = key_to_float(lo.to(tl.int32))
    tl.store(threshold_ptr + req_idx, threshold)


def find_thresholds(
    kind: ThresholdKind,
    values: Tensor,
    split_max: Tensor,
    layout: RequestLayout,
    truncation_params: Tensor,
    params: Tensor,
    valid_vocab: int,
    block_v: int,
    prior: Tensor | None = None,
) -> Tensor:
    """The thresholds of one kind, float32 [groups].

    values, split_max: see `survey_kernel`. truncation_params [groups, 3] float64. params: of the
    state. valid_vocab: ids at or beyond it are in no nucleus. block_v: the length that the
    vocabulary is split in, a power of two. prior: thresholds below which nothing counts.
    """
    num_reqs, (vocab_size, num_splits) = len(layout.state_rows), (values.shape[1], split_max.shape[1])
    coarse, fine = (
        [
            torch.empty(num_reqs, NUM_BOUNDS.value, *extra_dims, dtype=torch.int64, device=values.device)
            for extra_dims in ((), (num_splits,))
        ]
        for _ in range(2)
    )
    candidates = torch.empty(num_reqs, num_splits, block_v, dtype=torch.int32, device=values.device)
    num_candidates = torch.empty(num_reqs, num_splits, dtype=torch.int32, device=values.device)
    thresholds = torch.empty(num_reqs, device=values.device)
    layout_args = layout.state_rows, layout.row_start, layout.num_rows, truncation_params
    prior_thresholds = thresholds if prior is None else prior
    constants = {"KIND": int(kind), "BLOCK_S": triton.next_power_of_2(num_splits), "BLOCK_V": block_v}
    num_warps = max(block_v // 512, 1)
    for outputs in (coarse, fine):
        count_ge_kernel[(num_reqs, num_splits)](
            values, split_max, *layout_args, params, prior_thresholds, *coarse, *outputs, vocab_size,
            valid_vocab, num_splits,
            HAS_PRIOR=prior is not None, IS_FINE=outputs is fine, **constants, num_warps=num_warps,
        )  # fmt: skip
    compact_kernel[(num_reqs, num_splits)](
        values, split_max, *layout_args, *coarse, *fine, candidates, num_candidates, vocab_size,
        valid_vocab, num_splits, **constants, num_warps=num_warps,
    )  # fmt: skip
    bisect_kernel[(num_reqs,)](
        split_max, *layout_args, params, prior_thresholds, *coarse, *fine, candidates, num_candidates,
        thresholds, num_splits,
        HAS_PRIOR=prior is not None, **constants, num_warps=4,
    )  # fmt: skip
    return thresholds
