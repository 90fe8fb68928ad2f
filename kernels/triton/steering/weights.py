"""MATO's weights and the coefficients of the mix: the first launch of a steering step, one program a request.

    w_k ∝ w⁰_k exp(−(β/τ) (R_k − min R))        in log space and float64, as `kernels.steering.step.reweight`

Columns of the table are summed in chunks of one fixed size, zeros beyond a request's own objectives, so that
its weights do not depend on how many objectives others have. A request whose scores lie on the ray
b + a (m − b) gets the coefficients of m, the merged logits; b joins when a is known. The limits of its
filters (mask, top-k, top-p; 0 is off) are gathered for `search`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...steering.state import GREEDY_BELOW
from .top_k_top_p import NUCLEUS, TOP_K, TOP_P

CHUNK = 32
COLD = tl.constexpr(GREEDY_BELOW)


@triton.jit
def exponent(asked_ptr, rewards_ptr, at, inside, rate, least):
    """log w⁰ − rate · (R − least) of the table's entries `at`, and w⁰; −∞ where w⁰ is 0."""
    asked = tl.load(asked_ptr + at, mask=inside, other=0.0)
    rewards = tl.load(rewards_ptr + at, mask=inside, other=0.0)
    some = asked > 0
    log_asked = tl.log(tl.where(some, asked, 1.0))
    return tl.where(some, log_asked - rate * (rewards - least), float("-inf")), asked


@triton.jit(do_not_specialize=["vocab", "width"])
def weigh_kernel(
    table_ptr, first_ptr, count_ptr, branch_ptr, asked_ptr, rewards_ptr, steps_ptr, base_ptr, scale_ptr,
    delay_ptr, reward_ptr, beta_ptr, budget_ptr, temperature_ptr, mask_top_p_ptr, top_k_ptr, top_p_ptr,
    weights_ptr, reported_ptr, coefficient_ptr, strength_ptr, ray_ptr, limits_ptr, vocab, width,
    CHUNK: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64)
    row = tl.load(table_ptr + group)
    first, count = tl.load(first_ptr + group), tl.load(count_ptr + group)
    rate, beta = tl.load(reward_ptr + row), tl.load(beta_ptr + row)
    delay = tl.load(delay_ptr + row)
    starting = (delay != 0) & (tl.load(steps_ptr + row) == 0)
    base = tl.where(starting, 0.0, tl.load(base_ptr + row))
    scale = tl.where(starting, 1.0, tl.load(scale_ptr + row))
    limited = tl.load(budget_ptr + row) < float("inf")
    contrasted = (tl.load(branch_ptr + first) == 0) & (count > 1)
    ray = limited | (contrasted & (base == 1.0 - scale) & (delay == 0))

    lanes = tl.arange(0, CHUNK)
    leasts = tl.full([CHUNK], float("inf"), tl.float64)
    for start in range(0, width, CHUNK):
        column = start + lanes
        asked = tl.load(asked_ptr + row * width + column, mask=column < width, other=0.0)
        rewards = tl.load(rewards_ptr + row * width + column, mask=column < width, other=0.0)
        leasts = tl.minimum(leasts, tl.where(asked > 0, rewards, float("inf")))
    least = tl.min(leasts, axis=0)
    tops = tl.full([CHUNK], float("-inf"), tl.float64)
    for start in range(0, width, CHUNK):
        column = start + lanes
        exponents, _ = exponent(asked_ptr, rewards_ptr, row * width + column, column < width, rate, least)
        tops = tl.maximum(tops, exponents)
    top = tl.max(tops, axis=0)
    top = tl.where(top == float("-inf"), 0.0, top)
    sums = tl.zeros([CHUNK], tl.float64)
    for start in range(0, width, CHUNK):
        column = start + lanes
        exponents, _ = exponent(asked_ptr, rewards_ptr, row * width + column, column < width, rate, least)
        sums += tl.exp(exponents - top)
    total = tl.sum(sums, axis=0)
    total = tl.where(total > 0, total, 1.0)
    for start in range(0, width, CHUNK):
        column = start + lanes
        inside = column < width
        exponents, asked = exponent(asked_ptr, rewards_ptr, row * width + column, inside, rate, least)
        weights = tl.where(rate == 0, asked, tl.exp(exponents - top) / total)
        tl.store(weights_ptr + group * width + column, weights, mask=inside)
        rewards = tl.load(rewards_ptr + row * width + column, mask=inside, other=0.0)
        tl.store(reported_ptr + group * width + column, rewards * beta, mask=inside)
    for start in range(0, count, CHUNK):
        place = start + lanes
        inside = place < count
        branch = tl.load(branch_ptr + first + place, mask=inside, other=0)
        objective = branch > 0
        at = row * width + tl.where(objective, branch - 1, 0)
        exponents, asked = exponent(asked_ptr, rewards_ptr, at, inside & objective, rate, least)
        share = tl.where(rate == 0, asked, tl.exp(exponents - top) / total)
        free = tl.where(objective, scale * share, base)
        merged = tl.where(objective, share, 0.0)
        coefficient = tl.where(ray, merged, free)
        tl.store(coefficient_ptr + first + place, coefficient.to(tl.float32), mask=inside)
    tl.store(strength_ptr + group, scale)
    tl.store(ray_ptr + group, ray.to(tl.int32))
    warm = tl.load(temperature_ptr + row) >= COLD
    mask_top_p, top_p = tl.load(mask_top_p_ptr + row), tl.load(top_p_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    limits = limits_ptr + group * 3
    tl.store(limits + NUCLEUS, tl.where(mask_top_p < 1, mask_top_p, 0.0))
    tl.store(limits + TOP_K, tl.where(warm & (top_k < vocab), top_k, 0).to(tl.float64))
    tl.store(limits + TOP_P, tl.where(warm & (top_p < 1), top_p, 0.0))
