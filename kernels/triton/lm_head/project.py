"""The vocabulary's product and the mix of its rows in one pass: logits live in registers only.

    blend    (request, part of the width)   Σ c h, where nothing needs the branches apart: one row a request
    project  (tile of requests, tile of the vocabulary)   z = W h, and what is needed of it

A tile of rows has places for so many requests, each with `SLOTS` places for its branches, so that any numbers
of branches meet in one product, each weight is read once for all of them, and a request's rows are together.
Branches are mixed one after the other, in order, whatever stands in the tile. Of z stay (max, Σ exp) a row,
and of the scores s = Σ c z either the best token of the tile, or two rows a request: its first branch, and
Σ c z of the others (of one other: itself), with the coefficients that make s of them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..steering.gumbel import gumbel_at
from ..steering.score import NO_TOKEN
from ..steering.weights import COLD


@triton.jit
def coefficient_of(coefficient_ptr, strength_ptr, ray_ptr, group, place, slot, inside):
    """Of branches in the scores, float32; on a ray b + a (m − b), the base's share is added to that of m."""
    share = tl.load(coefficient_ptr + place, mask=inside, other=0.0)
    strength = tl.load(strength_ptr + group, mask=inside, other=0.0)
    rest = tl.where(slot == 0, 1.0 - strength, 0.0)
    free = tl.load(ray_ptr + group, mask=inside, other=0) == 0
    return tl.where(free, share, strength.to(tl.float32) * share + rest.to(tl.float32))


@triton.jit
def blend_kernel(
    hidden_ptr, first_ptr, count_ptr, coefficient_ptr, strength_ptr, ray_ptr, high_ptr, low_ptr,
    WIDTH: tl.constexpr, PART: tl.constexpr, PAIRED: tl.constexpr,
):  # fmt: skip
    """PAIRED: what `high` rounds off stands in `low`, so that two products of its type give the sum's."""
    group = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1) * PART + tl.arange(0, PART)
    first, count = tl.load(first_ptr + group), tl.load(count_ptr + group)
    total = tl.zeros([PART], tl.float32)
    for slot in range(count):
        place = first + slot
        hidden = tl.load(hidden_ptr + place * WIDTH + at, mask=at < WIDTH, other=0.0).to(tl.float32)
        total += hidden * coefficient_of(
            coefficient_ptr, strength_ptr, ray_ptr, group, place, place - first, count > 0
        )
    high = total.to(high_ptr.dtype.element_ty)
    tl.store(high_ptr + group * WIDTH + at, high, mask=at < WIDTH)
    if PAIRED:
        low = total - high.to(tl.float32)
        tl.store(low_ptr + group * WIDTH + at, low.to(low_ptr.dtype.element_ty), mask=at < WIDTH)


@triton.jit
def product(
    hidden_ptr, low_ptr, weight_ptr, place, there, token, inside,
    WIDTH: tl.constexpr, DEPTH: tl.constexpr, PAIRED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """W h, [tokens, rows] float32."""
    z = tl.zeros([token.shape[0], place.shape[0]], tl.float32)
    depth = tl.arange(0, DEPTH)
    rows = weight_ptr + token.to(tl.int64)[:, None] * WIDTH
    columns = place[:, None] * WIDTH
    for start in range(0, WIDTH, DEPTH):
        at = start + depth[None, :]
        weight_inside, row_inside = inside[:, None], there[:, None]
        if WIDTH % DEPTH != 0:
            weight_inside, row_inside = weight_inside & (at < WIDTH), row_inside & (at < WIDTH)
        weight = tl.load(rows + at, mask=weight_inside, other=0.0)
        hidden = tl.load(hidden_ptr + columns + at, mask=row_inside, other=0.0)
        if UPCAST:
            weight, hidden = weight.to(tl.float32), hidden.to(tl.float32)
        z = tl.dot(weight, tl.trans(hidden), z, input_precision="ieee")
        if PAIRED:
            low = tl.load(low_ptr + columns + at, mask=row_inside, other=0.0)
            if UPCAST:
                low = low.to(tl.float32)
            z = tl.dot(weight, tl.trans(low), z, input_precision="ieee")
    return z


@triton.jit
def branch_of(apart, index, SLOTS: tl.constexpr):
    """The logits of every request's branch `index`, [tokens, requests]; apart [tokens, requests, slots]."""
    slot = tl.arange(0, SLOTS)[None, None, :]
    return tl.sum(tl.where(slot == index, apart, 0.0), axis=2)


@triton.jit
def keep(
    apart, coefficient_ptr, kept_ptr, kept_coefficient_ptr, group, first, count, token, inside, vocab,
    BLENDED: tl.constexpr, KEPT: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Stores the first branch, and the mix of the others or the only other; and the shares of both."""
    here = group[None, :] * (KEPT * vocab) + token[:, None]
    within = inside[:, None] & (count > 0)[None, :]
    mixed = tl.zeros([token.shape[0], group.shape[0]], tl.float32)
    for index in range(SLOTS):
        branch = branch_of(apart, index, SLOTS)
        slot = first * 0 + index
        held = slot < count
        own = tl.where(held, 1.0, 0.0)
        if not BLENDED:
            own = tl.load(coefficient_ptr + first + index, mask=held, other=0.0)
        alone = (slot == 0) | (count == 2)
        to = kept_coefficient_ptr + group * KEPT + slot
        tl.store(to, tl.where(alone, own, 1.0), mask=held & (slot < KEPT))  # the same in every tile
        if index == 0:
            tl.store(kept_ptr + here, branch, mask=within)
        else:
            mixed += tl.where(alone, tl.where(held, 1.0, 0.0), own)[None, :] * branch
    if KEPT > 1:
        tl.store(kept_ptr + here + vocab, mixed, mask=within & (count > 1)[None, :])


@triton.jit
def steered(
    apart, coefficient_ptr, strength_ptr, ray_ptr, group, first, count, token,
    BLENDED: tl.constexpr, SLOTS: tl.constexpr,
):  # fmt: skip
    """Σ c z of every request, [tokens, requests]."""
    scores = tl.zeros([token.shape[0], group.shape[0]], tl.float32)
    for index in range(SLOTS):
        slot = first * 0 + index
        held = slot < count
        share = tl.where(held, 1.0, 0.0)
        if not BLENDED:
            place = first + slot
            share = coefficient_of(coefficient_ptr, strength_ptr, ray_ptr, group, place, slot, held)
        scores += share[None, :] * branch_of(apart, index, SLOTS)
    return scores


@triton.jit
def warmed(scores, steps_ptr, temperature_ptr, seed_ptr, row, present, token):
    """Scores/T plus noise where a request has a temperature, [tokens, requests]."""
    temperature = tl.load(temperature_ptr + row, mask=present, other=0.0)
    warm = temperature >= COLD
    if tl.max(warm.to(tl.int32), axis=0) > 0:
        seed = tl.load(seed_ptr + row, mask=present, other=0)
        position = tl.load(steps_ptr + row, mask=present, other=0)
        degrees = tl.where(warm, temperature, 1.0).to(tl.float32)[None, :]
        noise = gumbel_at(seed[None, :], position[None, :], token[:, None])
        scores = tl.where(warm[None, :], scores / degrees + noise, scores)
    return scores


@triton.jit(do_not_specialize=["named", "groups", "tiles"])
def project_kernel(
    hidden_ptr, low_ptr, weight_ptr, table_ptr, first_ptr, count_ptr,
    coefficient_ptr, strength_ptr, ray_ptr, steps_ptr, temperature_ptr, seed_ptr,
    kept_ptr, kept_coefficient_ptr, row_max_ptr, row_sum_ptr,
    score_max_ptr, score_sum_ptr, raw_ptr, broken_ptr, best_ptr, index_ptr,
    vocab, named, groups, tiles,
    BLENDED: tl.constexpr, STORED: tl.constexpr, NORMALISED: tl.constexpr, REPORTED: tl.constexpr,
    KEPT: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr, TOKENS: tl.constexpr,
    WIDTH: tl.constexpr, DEPTH: tl.constexpr, PAIRED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """hidden [rows, width], of one row a group where they are BLENDED; weight [vocab, width].

    STORED: kept [KEPT · groups, vocab] and their coefficients are written; else raw (the score of the best
    token), broken (how many scores are not finite), best and index [groups, tiles].
    """
    MEMBERS: tl.constexpr = ROWS // SLOTS
    tile = tl.program_id(1)
    group = (tl.program_id(0) * MEMBERS + tl.arange(0, MEMBERS)).to(tl.int64)
    present = group < groups
    lane = tl.arange(0, ROWS)
    owner = (tl.program_id(0) * MEMBERS + lane // SLOTS).to(tl.int64)
    place, there = owner, owner < groups
    first, count = group, present.to(tl.int64)
    if not BLENDED:
        place = tl.load(first_ptr + owner, mask=there, other=0) + lane % SLOTS
        there = there & (lane % SLOTS < tl.load(count_ptr + owner, mask=there, other=0))
        first = tl.load(first_ptr + group, mask=present, other=0)
        count = tl.load(count_ptr + group, mask=present, other=0)
    token = tile * TOKENS + tl.arange(0, TOKENS)
    inside = token < vocab
    z = product(hidden_ptr, low_ptr, weight_ptr, place, there, token, inside, WIDTH, DEPTH, PAIRED, UPCAST)
    if NORMALISED:
        masked = tl.where(inside[:, None], z, float("-inf"))
        top = tl.max(masked, axis=0)
        total = tl.sum(tl.exp(masked - top[None, :]), axis=0)
        tl.store(row_max_ptr + place * tiles + tile, top, mask=there)
        tl.store(row_sum_ptr + place * tiles + tile, total, mask=there)
    apart = tl.reshape(z, [TOKENS, MEMBERS, SLOTS])
    if STORED:
        keep(
            apart, coefficient_ptr, kept_ptr, kept_coefficient_ptr, group, first, count, token, inside, vocab,
            BLENDED, KEPT, SLOTS,
        )  # fmt: skip
    else:
        scores = steered(
            apart, coefficient_ptr, strength_ptr, ray_ptr, group, first, count, token, BLENDED, SLOTS
        )
        at = group * tiles + tile
        sound = tl.abs(scores) < float("inf")
        # counted in float32: of bits the compiler makes a word in local memory
        broken = tl.sum(tl.where(sound | (token >= vocab)[:, None], 0.0, 1.0), axis=0)
        tl.store(broken_ptr + at, broken.to(tl.int32), mask=present)
        allowed = tl.where((token < named)[:, None] & (scores == scores), scores, float("-inf"))
        row = tl.load(table_ptr + group, mask=present, other=0)
        allowed = warmed(allowed, steps_ptr, temperature_ptr, seed_ptr, row, present, token)
        best = tl.max(allowed, axis=0)
        chosen = tl.min(tl.where(allowed == best[None, :], token[:, None], NO_TOKEN), axis=0)
        tl.store(best_ptr + at, best, mask=present)
        tl.store(index_ptr + at, chosen, mask=present)
        if REPORTED:
            masked = tl.where(inside[:, None], scores, float("-inf"))
            top = tl.max(masked, axis=0)
            tl.store(score_max_ptr + at, top, mask=present)
            tl.store(score_sum_ptr + at, tl.sum(tl.exp(masked - top[None, :]), axis=0), mask=present)
            raw = tl.sum(tl.where(token[:, None] == chosen[None, :], scores, 0.0), axis=0)
            tl.store(raw_ptr + at, raw, mask=present)
