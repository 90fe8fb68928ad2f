"""The end of a steering step, one program a request: its token, what is reported of it, and its next state.

R_k ← R_k + l_k(y) − l_0(y)  (or their mean, or a moving average),  l = log-softmax of the branch logits
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...steering.coefficients import EMA as EMA_OF_PROGRAM
from ...steering.coefficients import MEAN as MEAN_OF_PROGRAM
from .score import NO_TOKEN
from .trust_region import divergence, node_moments, pick

ROWS = 16
MEAN, EMA = tl.constexpr(MEAN_OF_PROGRAM), tl.constexpr(EMA_OF_PROGRAM)


@triton.jit
def merged(tops_ptr, sums_ptr, parts, PAD: tl.constexpr):
    """(max, Σ exp) of a row from those of its parts."""
    part = tl.arange(0, PAD)
    tops = tl.load(tops_ptr + part, mask=part < parts, other=float("-inf"))
    top = tl.max(tops, axis=0)
    sums = tl.load(sums_ptr + part, mask=part < parts, other=0.0)
    return top, tl.sum(sums * tl.exp(tops - top), axis=0)


@triton.jit
def log_total(tops_ptr, sums_ptr, splits, S_PAD: tl.constexpr):
    """logsumexp of a row from (max, Σ exp) of its splits."""
    top, total = merged(tops_ptr, sums_ptr, splits, S_PAD)
    return top + tl.log(total)


@triton.jit
def branch_logprobs(
    logits_ptr, row_max_ptr, row_sum_ptr, place, inside, token, vocab, splits, S_PAD: tl.constexpr
):
    """Log-probability of the token in each row `place` of the logits."""
    part = tl.arange(0, S_PAD)[None, :]
    at, within = place[:, None] * splits + part, inside[:, None] & (part < splits)
    tops = tl.load(row_max_ptr + at, mask=within, other=float("-inf"))
    top = tl.where(inside, tl.max(tops, axis=1), 0.0)
    sums = tl.load(row_sum_ptr + at, mask=within, other=0.0) * tl.exp(tops - top[:, None])
    logit = tl.load(logits_ptr + place * vocab + token, mask=inside, other=0.0).to(tl.float32)
    return logit - (top + tl.log(tl.where(inside, tl.sum(sums, axis=1), 1.0)))


@triton.jit(do_not_specialize=["splits", "groups", "width"])
def finish_kernel(
    logits_ptr, mixed_ptr, table_ptr, first_ptr, count_ptr, branch_ptr, accumulate_ptr, decay_ptr,
    budget_ptr, rewards_ptr, steps_ptr, strength_ptr, ray_ptr, row_max_ptr, row_sum_ptr, score_max_ptr,
    score_sum_ptr, measured_ptr, broken_ptr, best_ptr, index_ptr, token_ptr, failed_ptr, logprob_ptr,
    kl_ptr, branch_logprob_ptr, total_ptr, vocab, splits, groups, width,
    LIMITED: tl.constexpr, MEASURED: tl.constexpr, REPORTED: tl.constexpr, NORMALISED: tl.constexpr,
    CHUNK: tl.constexpr, ROWS: tl.constexpr, S_PAD: tl.constexpr,
):  # fmt: skip
    group = tl.program_id(0).to(tl.int64)
    row = tl.load(table_ptr + group)
    first, count = tl.load(first_ptr + group), tl.load(count_ptr + group)
    part = tl.arange(0, S_PAD)
    at = group * splits + part
    bests = tl.load(best_ptr + at, mask=part < splits, other=float("-inf"))
    best = tl.max(bests, axis=0)
    index = tl.load(index_ptr + at, mask=part < splits, other=NO_TOKEN)
    token = tl.min(tl.where(bests == best, index, NO_TOKEN), axis=0)
    broken = tl.load(broken_ptr + at, mask=part < splits, other=0)
    broken += tl.load(broken_ptr + groups * splits + at, mask=part < splits, other=0)
    broken = tl.sum(broken, axis=0)
    failed = (broken != 0) | (best == float("-inf"))
    token = tl.where(failed, 0, token).to(tl.int64)
    tl.store(token_ptr + group, token)
    tl.store(failed_ptr + group, failed.to(tl.uint8))

    strength = tl.load(strength_ptr + group)
    on_ray = tl.load(ray_ptr + group) != 0
    if REPORTED:
        score = tl.load(mixed_ptr + group * vocab + token)
        if on_ray:
            base = tl.load(logits_ptr + first * vocab + token).to(tl.float32)
            score = (1.0 - strength).to(tl.float32) * base + strength.to(tl.float32) * score
        total = log_total(score_max_ptr + group * splits, score_sum_ptr + group * splits, splits, S_PAD)
        tl.store(total_ptr + group, total)
        tl.store(logprob_ptr + group, score - total)
    else:
        tl.store(logprob_ptr + group, float("nan"))

    kl = tl.zeros([], tl.float32) + float("nan")
    if MEASURED | LIMITED:
        limited = tl.load(budget_ptr + row) < float("inf")
        if on_ray & (MEASURED | limited):
            tops, totals, means, _ = node_moments(measured_ptr + group * 8 * splits, splits, 2, 2, S_PAD)
            node = tl.arange(0, 2)
            a = tl.where(node == 0, 1.0, strength.to(tl.float32))
            top_one, total_one, mean_one = pick(tops, node, 0), pick(totals, node, 0), pick(means, node, 0)
            kls = divergence(a, tops, totals, means, top_one, total_one, mean_one)
            kl = pick(kls, node, 1)
            kl = tl.where(kl < 0, 0.0, kl)
    tl.store(kl_ptr + group, kl.to(tl.float64))

    step = tl.load(steps_ptr + row) + 1
    tl.store(steps_ptr + row, step)
    kind, decay = tl.load(accumulate_ptr + row), tl.load(decay_ptr + row)
    contrasted = tl.load(branch_ptr + first) == 0
    lanes = tl.arange(0, ROWS)
    for start in range(0, width, CHUNK):
        column = start + tl.arange(0, CHUNK)
        gains = tl.zeros([CHUNK], tl.float32)
        base = tl.zeros([], tl.float32)
        for begin in range(0, count, ROWS):
            inside = begin + lanes < count
            place = first + begin + lanes
            logprobs = tl.full([ROWS], float("nan"), tl.float32)
            if NORMALISED:
                logprobs = branch_logprobs(
                    logits_ptr, row_max_ptr, row_sum_ptr, place, inside, token, vocab, splits, S_PAD
                )
                base = tl.where(begin == 0, tl.sum(tl.where(lanes == 0, logprobs, 0.0), axis=0), base)
                branch = tl.load(branch_ptr + place, mask=inside, other=0)
                own = (branch[:, None] - 1 == column[None, :]) & inside[:, None]
                gains += tl.sum(tl.where(own, logprobs[:, None] - base, 0.0), axis=0)
            tl.store(branch_logprob_ptr + place, logprobs, mask=inside)
        if NORMALISED:
            held = rewards_ptr + row * width + column
            before = tl.load(held, mask=column < width, other=0.0)
            gained = gains.to(tl.float64)
            after = before + gained
            after = tl.where(kind == MEAN, before + (gained - before) / step.to(tl.float64), after)
            after = tl.where(kind == EMA, decay * before + (1.0 - decay) * gained, after)
            known = contrasted & (tl.abs(after) < float("inf"))
            tl.store(held, tl.where(known, after, before), mask=column < width)
