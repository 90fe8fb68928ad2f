"""Top-k and top-p thresholds without a sort: the largest t such that the values ≥ t reach the target.

    count_ge_kernel  (request, split)   mass at or above each of 15 coarse bounds below the row maximum
    count_ge_kernel  (request, split)   if the coarse bracket may be large: the same for 15 bounds inside it
    compact_kernel   (request, split)   collect the values inside the bracket of the threshold
    bisect_kernel    (request)          bisect for the threshold among these values

The target is a count (top-k) or a probability mass (top-p, and the nucleus of Linear Alignment's preference
branch). Mass is a sum of integers, 2⁴⁰ times the probability relative to the top token, and so does not
depend on the order. Bisection runs on order-preserving integer keys of the float32 values, so that it ends at
exactly one value. All ties are kept. There are no reads by the host, and the number of launches is fixed. If
a row is nearly constant, all its values are in one bracket, and every step of `bisect_kernel` rereads them,
1,024 at a time.
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
"""Bracket size up to which `bisect_kernel` runs without a fine pass."""
NO_REFINE = tl.constexpr(1 << 40)
"""Stored instead of the lowest fine bound if the request had no fine pass."""
MASS_SCALE = tl.constexpr(REFERENCE_MASS_SCALE)
MIN_KEY, END_KEY = (
    tl.constexpr(-0x7F800001),
    tl.constexpr(0x7F800001),
)  # the key of −∞; one above the key of ∞


class ThresholdKind(IntEnum):
    """Which threshold to search for."""

    NUCLEUS = 0
    TOP_K = 1
    TOP_P = 2


TEMPERATURE, MASK_TEMPERATURE = column("temperature"), column("mask_temperature")
NUCLEUS, TOP_K, TOP_P = (tl.constexpr(int(kind)) for kind in ThresholdKind)


@triton.jit
def float_to_key(values):
    """Order-preserving int32 keys of float32 values; −0 and 0 have the same key."""
    bits = tl.where(values == 0, 0.0, values).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def key_to_float(keys):
    """Inverse of `float_to_key`."""
    return (keys ^ ((keys >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def get_row(row_start_ptr, num_rows_ptr, req_idx, KIND: tl.constexpr):
    """The row to search: the request's scores, or for a nucleus the logits of its last branch."""
    row = req_idx
    if KIND == NUCLEUS:
        row = tl.load(row_start_ptr + req_idx) + tl.load(num_rows_ptr + req_idx) - 1
    return row


@triton.jit
def load_temperature(params_ptr, params_stride, state_row, KIND: tl.constexpr):
    """The temperature of the mass that is searched for."""
    if KIND == NUCLEUS:
        temperature = load_param(params_ptr, params_stride, state_row, MASK_TEMPERATURE)
    else:
        temperature = load_param(params_ptr, params_stride, state_row, TEMPERATURE)
    return temperature.to(tl.float32)


@triton.jit
def load_split(
    values_ptr, row, split_idx, vocab_size, valid_vocab, KIND: tl.constexpr, BLOCK_V: tl.constexpr
):
    """The values of a split with NaN replaced by −∞, and their mask."""
    offs_v = split_idx * BLOCK_V + tl.arange(0, BLOCK_V)
    mask_v = offs_v < (valid_vocab if KIND == NUCLEUS else vocab_size)
    values = tl.load(values_ptr + row * vocab_size + offs_v, mask=mask_v, other=float("-inf")).to(tl.float32)
    return tl.where(values == values, values, float("-inf")), mask_v


@triton.jit
def load_row_max(split_max_ptr, row, num_splits, BLOCK_S: tl.constexpr):
    """The maximum of a row."""
    offs_s = tl.arange(0, BLOCK_S)
    return tl.max(
        tl.load(split_max_ptr + row * num_splits + offs_s, mask=offs_s < num_splits, other=float("-inf")),
        axis=0,
    )


@triton.jit
def bound_spacing(
    split_max_ptr, row, row_max, temperature, num_splits, KIND: tl.constexpr, BLOCK_S: tl.constexpr
):
    """Spacing of the coarse bounds: the temperature for masses; for counts 1, or 1/8 of the range of the
    split maxima if that is more, as with a large strength."""
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
    """Keys of the coarse bounds, int64: MIN_KEY, then rising to just below the row maximum.

    Their distance grows with the distance from the maximum.
    """
    steps_back = (bound_idx - NUM_BOUNDS).to(tl.float32)
    value = row_max + spacing * steps_back * (0.35 - 0.1 * steps_back)
    keys = float_to_key(tl.where(value == value, value, float("-inf"))).to(tl.int64)
    return tl.where(bound_idx == 0, MIN_KEY, keys)


@triton.jit
def token_mass(values, row_max, temperature, KIND: tl.constexpr):
    """Mass of each value: 1 for top-k, otherwise its fixed-point probability."""
    if KIND == TOP_K:
        mass = tl.full(values.shape, 1, tl.int32)
    else:
        log_ratio = tl.where(values >= row_max, 0.0, values - row_max)  # also where both are infinite
        mass = (tl.exp(log_ratio / temperature) * MASS_SCALE).to(tl.int64)
    return mass


@triton.jit
def find_bracket(bounds_ptr, sums_ptr, target, req_idx, num_splits, BLOCK_S: tl.constexpr):
    """(lo, hi, mass_lo, mass_hi): the last bound with enough mass, the next one, and their masses.

    Bounds are keys; they are loaded, since recomputing them in another kernel may round differently.
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
    """The target mass: `limit` for top-k, otherwise limit · total mass, that of the lowest bound."""
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
    """(lo, hi, mass_hi, target) of the bracket after both passes."""
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
    """Keys of the fine bounds: 16 equal steps in value from lo to hi, or in key space if lo is −∞."""
    lo_value = key_to_float(lo.to(tl.int32))
    hi_value = tl.where(hi == END_KEY, row_max, key_to_float(hi.to(tl.int32)))
    value = lo_value + (hi_value - lo_value) * (bound_idx.to(tl.float32) / 16)
    keys = float_to_key(tl.where(value == value, value, lo_value)).to(tl.int64)
    keys = tl.where(lo == MIN_KEY, lo + (((hi - lo) * bound_idx) >> 4), tl.minimum(tl.maximum(keys, lo), hi))
    return tl.where(bound_idx == 0, lo, keys)


@triton.jit(do_not_specialize=["params_stride", "num_splits", "valid_vocab"])
def count_ge_kernel(
    values_ptr, split_max_ptr, state_rows_ptr, row_start_ptr, num_rows_ptr, truncation_ptr,
    params_ptr, params_stride,
    prior_ptr,
    coarse_bounds_ptr, coarse_sums_ptr, bounds_ptr, sums_ptr, vocab_size, valid_vocab, num_splits,
    KIND: tl.constexpr, HAS_PRIOR: tl.constexpr, IS_FINE: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """values: logits for a nucleus, otherwise scores [requests, vocab]; split_max: their maxima;
    truncation [requests, 3]: p or k of each kind, 0 is off. sums [requests, 16, splits]; bounds [requests,
    16].

    HAS_PRIOR: count only tokens at or above the earlier thresholds `prior` [requests]. IS_FINE: the second
    pass, inside the coarse bracket.
    """
    req_idx, split_idx = tl.program_id(0).to(tl.int64), tl.program_id(1)
    limit = tl.load(truncation_ptr + req_idx * 3 + KIND)
    if limit > 0:
        row = get_row(row_start_ptr, num_rows_ptr, req_idx, KIND)
        row_max = load_row_max(split_max_ptr, row, num_splits, BLOCK_S)
        temperature = load_temperature(params_ptr, params_stride, tl.load(state_rows_ptr + req_idx), KIND)
        is_active = limit > 0
        if IS_FINE:
            target = load_target(coarse_sums_ptr, limit, req_idx, num_splits, KIND, BLOCK_S)
            lo, hi, mass_lo, mass_hi = find_bracket(
                coarse_bounds_ptr, coarse_sums_ptr, target, req_idx, num_splits, BLOCK_S
            )
            # upper limit of the number of values: all have the mass of the lowest
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
    """candidates [requests, splits, BLOCK_V]: the keys inside the bracket; num_candidates [requests, splits]:
    their number.
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
            # −∞, of masked tokens, is left out: a bracket from −∞ on would hold nearly the whole vocabulary
            in_bracket = mask_v & (keys > MIN_KEY) & (keys >= lo.to(tl.int32)) & (keys < hi)
            rank = tl.cumsum(in_bracket.to(tl.int32), axis=0)
            tl.store(candidates_ptr + split_offs * BLOCK_V + rank - 1, keys, mask=in_bracket)
            num_candidates = tl.max(rank, axis=0)
        tl.store(num_candidates_ptr + split_offs, num_candidates)


@triton.jit
def load_candidates(key_ptrs, mask, prior, row_max, temperature, KIND: tl.constexpr):
    """Candidate keys and their masses; masked candidates have mass 0."""
    keys = tl.load(key_ptrs, mask=mask, other=0)
    values = key_to_float(keys)
    mass = token_mass(values, row_max, temperature, KIND)
    return keys, tl.where(mask & (values >= prior), mass, 0)


@triton.jit(do_not_specialize=["params_stride"])
def bisect_kernel(
    split_max_ptr, state_rows_ptr, row_start_ptr, num_rows_ptr, truncation_ptr, params_ptr, params_stride,
    prior_ptr,
    coarse_bounds_ptr,
    coarse_sums_ptr, fine_bounds_ptr, fine_sums_ptr, candidates_ptr, num_candidates_ptr, threshold_ptr,
    num_splits,
    KIND: tl.constexpr, HAS_PRIOR: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """threshold [requests]: −∞ for requests without this filter."""
    KEYS_PER_SPLIT: tl.constexpr = BISECT_TILE // BLOCK_S
    req_idx = tl.program_id(0).to(tl.int64)
    limit = tl.load(truncation_ptr + req_idx * 3 + KIND)
    threshold = tl.zeros([], tl.float32) + float("-inf")
    if limit > 0:
        row = get_row(row_start_ptr, num_rows_ptr, req_idx, KIND)
        row_max = load_row_max(split_max_ptr, row, num_splits, BLOCK_S)
        temperature = load_temperature(params_ptr, params_stride, tl.load(state_rows_ptr + req_idx), KIND)
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
    """The thresholds of one kind, float32 [requests].

    values, split_max: see `count_ge_kernel`. truncation_params [requests, 3] float64. params: the state's
    columns. valid_vocab: ids from it on are in no nucleus. block_v: the split length, a power of two. prior:
    only values at or above these thresholds count.
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
    params_args = params, params.stride(0)
    prior_thresholds = thresholds if prior is None else prior
    constants = {"KIND": int(kind), "BLOCK_S": triton.next_power_of_2(num_splits), "BLOCK_V": block_v}
    num_warps = max(block_v // 512, 1)
    for outputs in (coarse, fine):
        count_ge_kernel[(num_reqs, num_splits)](
            values, split_max, *layout_args, *params_args, prior_thresholds, *coarse, *outputs, vocab_size,
            valid_vocab, num_splits,
            HAS_PRIOR=prior is not None, IS_FINE=outputs is fine, **constants, num_warps=num_warps,
        )  # fmt: skip
    compact_kernel[(num_reqs, num_splits)](
        values, split_max, *layout_args, *coarse, *fine, candidates, num_candidates, vocab_size,
        valid_vocab, num_splits, **constants, num_warps=num_warps,
    )  # fmt: skip
    bisect_kernel[(num_reqs,)](
        split_max, *layout_args, *params_args, prior_thresholds, *coarse, *fine, candidates, num_candidates,
        thresholds, num_splits,
        HAS_PRIOR=prior is not None, **constants, num_warps=4,
    )  # fmt: skip
    return thresholds
