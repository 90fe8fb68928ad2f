"""KL trust region on a GPU: a fixed number of passes instead of a data-dependent search.

Along the ray b + a d, d = m − b, with A(a) = logsumexp(b + a d); a constant subtracted from d cancels in

    KL(a) = (a − 1) A′(a) − [A(a) − A(1)],    d log KL / d log(a − 1) = (a − 1)² A″(a) / KL(a)

`mix_logits_kernel` computes moments at 8 strengths from 1 to a_T. `kl_bracket_kernel` brackets the budget
between two of them, and computes moments at 12 strengths inside the bracket. `solve_strength` reads the
strength off a monotone cubic of log KL over log(a − 1), with the same margin below the budget as
`kernels.steering.trust_region`, and KL is measured there. A KL that is NaN exceeds every budget.

Moments are stored as [request, moment, strength, split], each split relative to its own maximum.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...steering.trust_region import TOLERANCE
from .columns import column, load_param
from .masks import FORBIDDEN_LOGIT, forbidden_in_trust_region

NUM_COARSE, NUM_INNER, MAX_POINTS = 8, 12, 16
"""Strengths of the two passes, and the power of two that covers both."""
COARSE_POINTS, INNER_POINTS = tl.constexpr(NUM_COARSE), tl.constexpr(NUM_INNER)
KL_BUDGET = column("kl_budget")
TARGET_FRACTION = tl.constexpr(1 - TOLERANCE / 2)


@triton.jit
def store_moments(sums_ptr, point_idx, base, direction, a, split_idx, num_splits, NUM_POINTS: tl.constexpr):
    """Store one split's (max, Σ e, Σ e d, Σ e d²) of b + a d [BLOCK_V]; masked entries have b = −∞, d = 0."""
    scores = base + a * direction
    max_value = tl.max(scores, axis=0)
    exps = tl.exp(scores - max_value)
    point_ptr = sums_ptr + point_idx * num_splits + split_idx
    stride_moment = NUM_POINTS * num_splits
    tl.store(point_ptr, max_value)
    tl.store(point_ptr + stride_moment, tl.sum(exps, axis=0))
    exps *= direction
    tl.store(point_ptr + 2 * stride_moment, tl.sum(exps, axis=0))
    tl.store(point_ptr + 3 * stride_moment, tl.sum(exps * direction, axis=0))


@triton.jit
def load_moments(
    sums_ptr, num_splits, NUM_POINTS: tl.constexpr, MAX_POINTS: tl.constexpr, BLOCK_S: tl.constexpr
):
    """(max, Σ e, mean of d, variance of d) over all splits, [MAX_POINTS] each."""
    offs_p, offs_s = tl.arange(0, MAX_POINTS)[:, None], tl.arange(0, BLOCK_S)[None, :]
    mask = (offs_p < NUM_POINTS) & (offs_s < num_splits)
    point_ptrs = sums_ptr + offs_p * num_splits + offs_s
    stride_moment = NUM_POINTS * num_splits
    maxes = tl.load(point_ptrs, mask=mask, other=float("-inf"))
    max_value = tl.max(maxes, axis=1)
    max_value = tl.where(tl.arange(0, MAX_POINTS) < NUM_POINTS, max_value, 0.0)
    rescale = tl.exp(maxes - max_value[:, None])
    sum_exp = tl.sum(tl.load(point_ptrs + stride_moment, mask=mask, other=0.0) * rescale, axis=1)
    sum_d = tl.sum(tl.load(point_ptrs + 2 * stride_moment, mask=mask, other=0.0) * rescale, axis=1)
    sum_d2 = tl.sum(tl.load(point_ptrs + 3 * stride_moment, mask=mask, other=0.0) * rescale, axis=1)
    sum_exp = tl.where(tl.arange(0, MAX_POINTS) < NUM_POINTS, sum_exp, 1.0)
    mean = sum_d / sum_exp
    return max_value, sum_exp, mean, tl.maximum(sum_d2 / sum_exp - mean * mean, 0.0)


@triton.jit
def select(values, indices, target_idx):
    """The entry of `values` at `target_idx`."""
    return tl.sum(tl.where(indices == target_idx, values, 0.0), axis=0)


@triton.jit
def kl_divergence(a, max_value, sum_exp, mean, max_one, sum_one, mean_one):
    """KL(a) from the moments at a and at 1; subtracts before it adds, to limit float32 rounding."""
    log_ratio = (max_value - max_one) - (a - 1.0) * mean_one + tl.log(sum_exp / sum_one)
    return (a - 1.0) * (mean - mean_one) - log_ratio


@triton.jit
def coarse_strength(point_idx, max_strength):
    """Coarse strengths: 1, then 1 + (a_T − 1) ρ^(7 − point_idx), with ρ^6 = 1/64, or less to reach 1.03."""
    max_excess = tl.maximum(max_strength - 1.0, 1e-30)
    rho = tl.exp(tl.minimum(tl.log(0.03 / max_excess) / 6.0, -0.6931472))
    power = tl.exp((point_idx - (COARSE_POINTS - 1)) * -tl.log(rho))
    a = 1.0 + (max_strength - 1.0) * power
    return tl.where(point_idx == 0, 1.0, tl.where(point_idx == COARSE_POINTS - 1, max_strength, a))


@triton.jit
def inner_strength(point_idx, lo, hi):
    """Inner strengths, evenly spaced in log(a − 1) from lo to hi; with lo = 1, over six octaves below hi."""
    hi_excess = tl.maximum(hi - 1.0, 1e-30)
    lo_excess = tl.where(lo > 1.0, lo - 1.0, hi_excess / 64.0)
    fraction = tl.minimum(point_idx.to(tl.float32) / (INNER_POINTS - 1), 1.0)
    a = 1.0 + lo_excess * tl.exp(fraction * tl.log(hi_excess / lo_excess))
    return tl.where(point_idx >= INNER_POINTS - 1, hi, a)


@triton.jit(do_not_specialize=["params_stride", "num_splits"])
def masked_coarse_sums_kernel(
    logits_ptr, mixed_logits_ptr, state_rows_ptr, row_start_ptr, num_rows_ptr, params_ptr, params_stride,
    coef_ptr,
    strength_ptr, row_valid_max_ptr, centre_ptr, coarse_sums_ptr, vocab_size, num_splits,
    NUM_COARSE: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """The coarse sums of a step with masks: these need the rows' maxima, which the mixing pass finds."""
    req_idx, split_idx = tl.program_id(0).to(tl.int64), tl.program_id(1)
    state_row = tl.load(state_rows_ptr + req_idx)
    if load_param(params_ptr, params_stride, state_row, KL_BUDGET) < float("inf"):
        row_start, num_rows = tl.load(row_start_ptr + req_idx), tl.load(num_rows_ptr + req_idx)
        max_strength = tl.load(strength_ptr + req_idx).to(tl.float32)
        offs_v = split_idx * BLOCK_V + tl.arange(0, BLOCK_V)
        mask_v = offs_v < vocab_size
        base = tl.load(logits_ptr + row_start * vocab_size + offs_v, mask=mask_v, other=float("-inf"))
        base = base.to(tl.float32)
        mixed = tl.load(mixed_logits_ptr + req_idx * vocab_size + offs_v, mask=mask_v, other=0.0)
        direction = tl.where(mask_v, mixed - base - tl.load(centre_ptr + req_idx), 0.0)
        forbidden = forbidden_in_trust_region(
            logits_ptr, coef_ptr, row_valid_max_ptr, params_ptr, params_stride,
            state_row, row_start, num_rows, 1.0,
            1.0 - max_strength, offs_v, mask_v, vocab_size, num_splits, BLOCK_S,
        )  # fmt: skip
        base = tl.where(forbidden, FORBIDDEN_LOGIT, base)
        sums_ptr = coarse_sums_ptr + req_idx * 4 * NUM_COARSE * num_splits
        for point_idx in range(NUM_COARSE):
            a = coarse_strength(split_idx * 0 + point_idx, max_strength)
            store_moments(sums_ptr, point_idx, base, direction, a, split_idx, num_splits, NUM_COARSE)


@triton.jit(do_not_specialize=["params_stride", "num_splits"])
def kl_bracket_kernel(
    logits_ptr, mixed_logits_ptr, state_rows_ptr, row_start_ptr, num_rows_ptr, params_ptr, params_stride,
    coef_ptr,
    strength_ptr, row_valid_max_ptr, centre_ptr, coarse_sums_ptr, bracket_ptr, inner_sums_ptr,
    vocab_size, num_splits,
    HAS_MASKS: tl.constexpr, NUM_COARSE: tl.constexpr, NUM_INNER: tl.constexpr, BLOCK_S: tl.constexpr,
    BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Bracket the strength, and compute the moments of the inner strengths. bracket [requests, 6]: lo, hi,
    whether a_T obeys the budget, the centre of d, and A(1) of the centred d as max and Σ e."""
    req_idx, split_idx = tl.program_id(0).to(tl.int64), tl.program_id(1)
    state_row = tl.load(state_rows_ptr + req_idx)
    kl_budget = load_param(params_ptr, params_stride, state_row, KL_BUDGET).to(tl.float32)
    if kl_budget < float("inf"):
        max_strength = tl.load(strength_ptr + req_idx).to(tl.float32)
        max_value, sum_exp, mean, _ = load_moments(
            coarse_sums_ptr + req_idx * 4 * NUM_COARSE * num_splits,
            num_splits,
            NUM_COARSE,
            NUM_COARSE,
            BLOCK_S,
        )
        point_idx = tl.arange(0, NUM_COARSE)
        a = coarse_strength(point_idx, max_strength)
        mean_one, max_one, sum_one = (
            select(mean, point_idx, 0),
            select(max_value, point_idx, 0),
            select(sum_exp, point_idx, 0),
        )
        kl = kl_divergence(a, max_value, sum_exp, mean, max_one, sum_one, mean_one)
        obeys = (kl <= kl_budget) | (point_idx == 0)
        first_beyond = tl.min(tl.where(obeys, NUM_COARSE, point_idx), axis=0)
        all_obey = select(obeys.to(tl.float32), point_idx, NUM_COARSE - 1)
        lo = select(a, point_idx, tl.minimum(first_beyond, NUM_COARSE - 1) - 1)
        hi = select(a, point_idx, tl.minimum(first_beyond, NUM_COARSE - 1))
        prev_centre = tl.load(centre_ptr + req_idx)
        centre = prev_centre + mean_one
        shift = centre - prev_centre  # the rounded difference
        if split_idx == 0:
            bracket_out_ptr = bracket_ptr + req_idx * 6
            tl.store(bracket_out_ptr, lo)
            tl.store(bracket_out_ptr + 1, hi)
            tl.store(bracket_out_ptr + 2, all_obey)
            tl.store(bracket_out_ptr + 3, centre)
            tl.store(bracket_out_ptr + 4, max_one - shift)
            tl.store(bracket_out_ptr + 5, sum_one)
        if all_obey == 0:
            offs_v = split_idx * BLOCK_V + tl.arange(0, BLOCK_V)
            mask_v = offs_v < vocab_size
            row_start = tl.load(row_start_ptr + req_idx)
            base = tl.load(logits_ptr + row_start * vocab_size + offs_v, mask=mask_v, other=float("-inf")).to(
                tl.float32
            )
            mixed = tl.load(mixed_logits_ptr + req_idx * vocab_size + offs_v, mask=mask_v, other=0.0)
            direction = tl.where(mask_v, mixed - base - centre, 0.0)
            if HAS_MASKS:
                forbidden = forbidden_in_trust_region(
                    logits_ptr, coef_ptr, row_valid_max_ptr, params_ptr, params_stride, state_row, row_start,
                    tl.load(num_rows_ptr + req_idx), 1.0, 1.0 - max_strength, offs_v, mask_v, vocab_size,
                    num_splits, BLOCK_S,
                )  # fmt: skip
                base = tl.where(forbidden, FORBIDDEN_LOGIT, base)
            sums_ptr = inner_sums_ptr + req_idx * 4 * NUM_INNER * num_splits
            for inner_idx in range(NUM_INNER):
                a_inner = inner_strength(split_idx * 0 + inner_idx, lo, hi)
                store_moments(sums_ptr, inner_idx, base, direction, a_inner, split_idx, num_splits, NUM_INNER)


@triton.jit
def hermite_cubic(t, y0, y1, s0, s1):
    """Cubic Hermite interpolant on [0, 1] with values y and slopes s at the ends."""
    u = 1.0 - t
    return u * u * ((1.0 + 2.0 * t) * y0 + t * s0) + t * t * ((3.0 - 2.0 * t) * y1 - u * s1)


@triton.jit
def hermite_root(target, y0, y1, s0, s1):
    """Largest t in [0, 1] with the monotone cubic ≤ `target`, to 1/65536: two counts over 256 points."""
    steps = (tl.arange(0, 256) + 1).to(tl.float32) / 256.0
    count = tl.sum((hermite_cubic(steps, y0, y1, s0, s1) <= target).to(tl.float32), axis=0)
    coarse = count / 256.0
    fine = coarse + steps / 256.0
    count = tl.sum((hermite_cubic(fine, y0, y1, s0, s1) <= target).to(tl.float32), axis=0)
    return tl.minimum(coarse + count / 65536.0, 1.0)


@triton.jit
def solve_strength(
    bracket_ptr, inner_sums_ptr, max_strength, kl_budget, num_splits,
    NUM_INNER: tl.constexpr, MAX_POINTS: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """The strength a* and the centre of d of one request."""
    lo, hi = tl.load(bracket_ptr), tl.load(bracket_ptr + 1)
    a_star = max_strength
    centre = tl.load(bracket_ptr + 3)
    if tl.load(bracket_ptr + 2) == 0:
        max_one, sum_one = tl.load(bracket_ptr + 4), tl.load(bracket_ptr + 5)
        max_value, sum_exp, mean, variance = load_moments(
            inner_sums_ptr, num_splits, NUM_INNER, MAX_POINTS, BLOCK_S
        )
        point_idx = tl.arange(0, MAX_POINTS)
        a = inner_strength(point_idx, lo, hi)
        kl = kl_divergence(a, max_value, sum_exp, mean, max_one, sum_one, 0.0)
        obeys = (kl <= kl_budget) | (point_idx >= NUM_INNER)
        kl = tl.maximum(kl, 1e-12)
        first_beyond = tl.min(tl.where(obeys, NUM_INNER, point_idx), axis=0)
        hi_idx = tl.maximum(tl.minimum(first_beyond, NUM_INNER - 1), 1)
        lo_idx = hi_idx - 1
        slopes = (a - 1.0) * (a - 1.0) * variance / kl
        target = tl.log(kl_budget * TARGET_FRACTION)
        x0, x1 = tl.log(select(a, point_idx, lo_idx) - 1.0), tl.log(select(a, point_idx, hi_idx) - 1.0)
        y0, y1 = tl.log(select(kl, point_idx, lo_idx)), tl.log(select(kl, point_idx, hi_idx))
        dx = x1 - x0
        max_slope = 3.0 * tl.maximum(y1 - y0, 0.0)
        s0 = tl.minimum(select(slopes, point_idx, lo_idx) * dx, max_slope)
        s1 = tl.minimum(select(slopes, point_idx, hi_idx) * dx, max_slope)
        x = x0 + dx * hermite_root(target, y0, y1, s0, s1)
        # below the lowest strength KL is nearly quadratic
        x = tl.where(first_beyond == 0, x0 + tl.minimum(target - y0, 0.0) / 2.0, x)
        a_star = tl.minimum(1.0 + tl.exp(x), max_strength)
        a_star = tl.where(a_star >= 1.0, a_star, 1.0)
    return a_star, centre
