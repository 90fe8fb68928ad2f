"""What a step without logits must still know of them: the chosen token's, and each row's normaliser.

One program a branch, or a request where no branch is asked after. It finds the token from the best of every
part of the vocabulary, as `finish` does, multiplies that token's row of W with the branch's hidden state, and
merges what the parts left. To `finish` the step then has one part, and a vocabulary of one token.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..steering.finalize import merged
from ..steering.score import NO_TOKEN
from ..steering.trust_region import node_moments


@triton.jit
def logit(hidden_ptr, weight_ptr, place, token, WIDTH: tl.constexpr, PART: tl.constexpr):
    """One entry of hidden Wᵀ, float32."""
    sums = tl.zeros([PART], tl.float32)
    for start in range(0, WIDTH, PART):
        at = start + tl.arange(0, PART)
        hidden = tl.load(hidden_ptr + place * WIDTH + at, mask=at < WIDTH, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + token * WIDTH + at, mask=at < WIDTH, other=0.0).to(tl.float32)
        sums += hidden * weight
    return tl.sum(sums, axis=0)


@triton.jit(do_not_specialize=["parts", "tiles", "groups"])
def settle_kernel(
    hidden_ptr, weight_ptr, table_ptr, first_ptr, count_ptr, ray_ptr, budget_ptr, tile_max_ptr, tile_sum_ptr,
    best_ptr, index_ptr, broken_ptr, score_max_ptr, score_sum_ptr, raw_ptr, measured_ptr, strength_ptr,
    column_ptr, row_max_ptr, row_sum_ptr, one_best_ptr, one_index_ptr, one_broken_ptr,
    one_max_ptr, one_sum_ptr, one_raw_ptr, one_measured_ptr, one_strength_ptr, token_ptr,
    vocab, parts, tiles, groups,
    STORED: tl.constexpr, NORMALISED: tl.constexpr, REPORTED: tl.constexpr, LIMITED: tl.constexpr,
    MEASURED: tl.constexpr, WIDTH: tl.constexpr, PART: tl.constexpr, P_PAD: tl.constexpr, T_PAD: tl.constexpr,
):  # fmt: skip
    """raw: scores of the best token of each part, or STORED, of every token. one_…: of the one part left."""
    group, slot = tl.program_id(0).to(tl.int64), tl.program_id(1)
    part = tl.arange(0, P_PAD)
    at = group * parts + part
    bests = tl.load(best_ptr + at, mask=part < parts, other=float("-inf"))
    best = tl.max(bests, axis=0)
    index = tl.load(index_ptr + at, mask=part < parts, other=NO_TOKEN)
    token = tl.min(tl.where(bests == best, index, NO_TOKEN), axis=0)
    broken = tl.load(broken_ptr + at, mask=part < parts, other=0)
    if STORED:
        broken += tl.load(broken_ptr + groups * parts + at, mask=part < parts, other=0)
    broken = tl.sum(broken, axis=0)
    failed = (broken != 0) | (best == float("-inf"))
    token = tl.where(failed, 0, token).to(tl.int64)
    if slot == 0:
        tl.store(token_ptr + group, token)
        tl.store(one_best_ptr + group, best)
        tl.store(one_index_ptr + group, 0)
        tl.store(one_broken_ptr + group, broken)
        tl.store(one_broken_ptr + groups + group, 0)
        tl.store(one_strength_ptr + group, tl.load(strength_ptr + group))
        if REPORTED:
            top, total = merged(score_max_ptr + group * parts, score_sum_ptr + group * parts, parts, P_PAD)
            tl.store(one_max_ptr + group, top)
            tl.store(one_sum_ptr + group, total)
            if STORED:
                raw = tl.load(raw_ptr + group * vocab + token)
            else:
                raws = tl.load(raw_ptr + at, mask=part < parts, other=0.0)
                raw = tl.sum(tl.where(index == token, raws, 0.0), axis=0)
            tl.store(one_raw_ptr + group, raw)
        if LIMITED | MEASURED:
            limited = tl.load(budget_ptr + tl.load(table_ptr + group)) < float("inf")
            if (tl.load(ray_ptr + group) != 0) & (MEASURED | limited):
                tops, totals, means, variances = node_moments(
                    measured_ptr + group * 8 * parts, parts, 2, 2, P_PAD
                )
                out = one_measured_ptr + group * 8 + tl.arange(0, 2)
                tl.store(out, tops)
                tl.store(out + 2, totals)
                tl.store(out + 4, means * totals)
                tl.store(out + 6, (variances + means * means) * totals)
    if NORMALISED | REPORTED:
        if slot < tl.load(count_ptr + group):
            place = tl.load(first_ptr + group) + slot
            tl.store(column_ptr + place, logit(hidden_ptr, weight_ptr, place, token, WIDTH, PART))
            if NORMALISED:
                top, total = merged(tile_max_ptr + place * tiles, tile_sum_ptr + place * tiles, tiles, T_PAD)
                tl.store(row_max_ptr + place, top)
                tl.store(row_sum_ptr + place, total)
