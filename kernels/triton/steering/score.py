"""Scores: from the mixed logits to what may be chosen, in splits of the vocabulary.

    s = (1 − a) b + a m on a ray, a from the trust region where there is one; else s is the mix itself
    then ids without a token, support mask, bias and bans, repetition

Each split leaves (max, Σ exp) of s, the sums of b + a d and b + d that KL is measured by, and its best token
by s alone or, where there is a temperature, by s/T plus Gumbel noise. With top-k, top-p or min-p in the batch
the allowed scores are stored instead, and `choose` takes the best token when the thresholds are known.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .gumbel import gumbel_at
from .mix_logits import not_finite
from .trust_region import node_sums, solve
from .weights import COLD

NO_TOKEN = tl.constexpr(2**31 - 1)
"""Behind every token, where the lowest is looked for."""


@triton.jit
def store_best(best_ptr, index_ptr, at, scores, token):
    """Stores one split's largest score and the lowest token that has it."""
    best = tl.max(scores, axis=0)
    tl.store(best_ptr + at, best)
    tl.store(index_ptr + at, tl.min(tl.where(scores == best, token, NO_TOKEN), axis=0))


@triton.jit
def warmed(scores, token, seed_ptr, temperature, row, position):
    """Scores/T plus noise."""
    return scores / temperature.to(tl.float32) + gumbel_at(tl.load(seed_ptr + row), position, token)


@triton.jit(do_not_specialize=["splits", "groups", "named", "kept"])
def score_kernel(
    logits_ptr, mixed_ptr, steered_ptr, allowed_ptr, added_ptr, penalty_ptr, table_ptr, first_ptr,
    count_ptr, strength_ptr, ray_ptr, steps_ptr, budget_ptr, temperature_ptr, seed_ptr,
    centre_ptr, bracket_ptr, inner_ptr, nucleus_ptr, chosen_strength_ptr, score_max_ptr,
    score_sum_ptr, measured_ptr, broken_ptr, allowed_max_ptr, best_ptr, index_ptr,
    vocab, named, splits, groups, kept,
    LIMITED: tl.constexpr, MASKED: tl.constexpr, EDITED: tl.constexpr, FILTERED: tl.constexpr,
    MEASURED: tl.constexpr, REPORTED: tl.constexpr, INNER: tl.constexpr, TILE: tl.constexpr,
    S_PAD: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """added, penalty: what Edits add to and divide by, [groups, vocab]. kept: steered scores are stored where
    they are REPORTED; it is asked as the kernel runs, which has variants enough.
    """
    group, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = tl.load(table_ptr + group)
    first, count = tl.load(first_ptr + group), tl.load(count_ptr + group)
    on_ray = tl.load(ray_ptr + group) != 0
    strength = tl.load(strength_ptr + group)
    centre = tl.load(centre_ptr + group)
    limited = strength != strength
    if LIMITED:
        budget = tl.load(budget_ptr + row).to(tl.float32)
        limited = budget < float("inf")
        if limited:
            bracket, inner = bracket_ptr + group * 6, inner_ptr + group * 4 * INNER * splits
            limit = strength.to(tl.float32)
            a_star, centre = solve(bracket, inner, limit, budget, splits, INNER, TILE, S_PAD)
            strength = tl.where(a_star == limit, strength, a_star.to(tl.float64))
    tl.store(chosen_strength_ptr + group, strength, mask=split == 0)

    token = split * SPLIT + tl.arange(0, SPLIT)
    inside = token < vocab
    here = group * vocab + token
    a = strength.to(tl.float32)
    scores = tl.load(mixed_ptr + here, mask=inside, other=0.0)
    if on_ray:
        base = tl.load(logits_ptr + first * vocab + token, mask=inside, other=float("-inf")).to(tl.float32)
        if MEASURED | LIMITED:
            if MEASURED | limited:
                direction = tl.where(inside, scores - base - centre, 0.0)
                sums = measured_ptr + group * 8 * splits
                node_sums(sums, 0, base, direction, 1.0, split, splits, 2)
                node_sums(sums, 1, base, direction, a, split, splits, 2)
        scores = (1.0 - strength).to(tl.float32) * base + a * scores
    at = group * splits + split
    tl.store(broken_ptr + groups * splits + at, not_finite(scores, inside))
    if REPORTED:
        if kept:
            tl.store(steered_ptr + here, scores, mask=inside)
        masked = tl.where(inside, scores, float("-inf"))
        top = tl.max(masked, axis=0)
        tl.store(score_max_ptr + at, top)
        tl.store(score_sum_ptr + at, tl.sum(tl.exp(masked - top), axis=0))

    scores = tl.where((token < named) & (scores == scores), scores, float("-inf"))
    if MASKED:
        least = tl.load(nucleus_ptr + group)
        preferred = tl.load(logits_ptr + (first + count - 1) * vocab + token, mask=inside, other=0.0)
        scores = tl.where(preferred.to(tl.float32) >= least, scores, float("-inf"))
    if EDITED:
        scores += tl.load(added_ptr + here, mask=inside, other=0.0)
        penalty = tl.load(penalty_ptr + here, mask=inside, other=1.0)
        scores = tl.where(scores > 0, scores / penalty, scores * penalty)
    if FILTERED:
        tl.store(allowed_ptr + here, scores, mask=inside)
        tl.store(allowed_max_ptr + at, tl.max(scores, axis=0))
    else:
        temperature = tl.load(temperature_ptr + row)
        if temperature >= COLD:
            scores = warmed(scores, token, seed_ptr, temperature, row, tl.load(steps_ptr + row))
        store_best(best_ptr, index_ptr, at, scores, token)


@triton.jit(do_not_specialize=["splits"])
def choose_kernel(
    allowed_ptr, allowed_max_ptr, table_ptr, steps_ptr, temperature_ptr, min_p_ptr, seed_ptr,
    kth_ptr, nucleus_ptr, best_ptr, index_ptr, vocab, splits,
    WITH_K: tl.constexpr, WITH_P: tl.constexpr, S_PAD: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """The best token of a split among those at or above all thresholds."""
    group, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = tl.load(table_ptr + group)
    token = split * SPLIT + tl.arange(0, SPLIT)
    scores = tl.load(allowed_ptr + group * vocab + token, mask=token < vocab, other=float("-inf"))
    temperature = tl.load(temperature_ptr + row)
    if temperature >= COLD:
        part = tl.arange(0, S_PAD)
        tops = tl.load(allowed_max_ptr + group * splits + part, mask=part < splits, other=float("-inf"))
        min_p = tl.load(min_p_ptr + row).to(tl.float32)
        some = min_p > 0
        below = tl.where(some, tl.log(tl.where(some, min_p, 1.0)) * temperature.to(tl.float32), float("-inf"))
        least = tl.max(tops, axis=0) + below
        if WITH_K:
            least = tl.maximum(least, tl.load(kth_ptr + group))
        if WITH_P:
            least = tl.maximum(least, tl.load(nucleus_ptr + group))
        kept = scores >= least
        scores = tl.where(kept, scores, float("-inf"))
        if tl.max(scores, axis=0) > float("-inf"):  # few splits hold any of those that are kept
            noisy = warmed(scores, token, seed_ptr, temperature, row, tl.load(steps_ptr + row))
            scores = tl.where(kept, noisy, float("-inf"))
    store_best(best_ptr, index_ptr, group * splits + split, scores, token)
