"""The trust region on a device: a fixed number of passes instead of a search that waits for its result.

Along the ray b + a d, d = m − b, with A(a) = logsumexp(b + a d) and a constant c taken from d, which cancels,

    KL(a) = (a − 1) A′(a) − [A(a) − A(1)],    d log KL / d log(a − 1) = (a − 1)² A″(a) / KL(a)

The mixing pass sums 8 strengths, 1 and up to a_T; `refine` finds the two between which the budget lies, and
sums 12 between them, with second moments. The strength is then read off a monotone cubic of log KL over
log(a − 1), aimed as far below the budget as the search of `kernels.steering.trust_region`, and KL is
measured there. A divergence that is not a number obeys no budget.

Sums lie by [group, moment, node, split]; each split has its own largest exponent.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...steering.trust_region import TOLERANCE

COARSE, INNER, TILE = 8, 12, 16
"""Strengths of the two passes, and the power of two that holds either."""
COARSE_NODES, INNER_NODES = tl.constexpr(COARSE), tl.constexpr(INNER)
AIM = tl.constexpr(1 - TOLERANCE / 2)


@triton.jit
def node_sums(out_ptr, node, base, direction, a, split, splits, NODES: tl.constexpr):
    """Stores one split's (max, Σ e, Σ e d, Σ e d²) of b + a d [split length]; outside, b is −∞ and d is 0."""
    scores = base + a * direction
    top = tl.max(scores, axis=0)
    weights = tl.exp(scores - top)
    at = out_ptr + node * splits + split
    step = NODES * splits
    tl.store(at, top)
    tl.store(at + step, tl.sum(weights, axis=0))
    weights *= direction
    tl.store(at + 2 * step, tl.sum(weights, axis=0))
    tl.store(at + 3 * step, tl.sum(weights * direction, axis=0))


@triton.jit
def node_moments(sums_ptr, splits, NODES: tl.constexpr, TILE: tl.constexpr, S_PAD: tl.constexpr):
    """(max, Σ e, mean of d, variance of d) over all splits, [TILE] each."""
    node, split = tl.arange(0, TILE)[:, None], tl.arange(0, S_PAD)[None, :]
    inside = (node < NODES) & (split < splits)
    at = sums_ptr + node * splits + split
    step = NODES * splits
    tops = tl.load(at, mask=inside, other=float("-inf"))
    top = tl.max(tops, axis=1)
    top = tl.where(tl.arange(0, TILE) < NODES, top, 0.0)
    factor = tl.exp(tops - top[:, None])
    total = tl.sum(tl.load(at + step, mask=inside, other=0.0) * factor, axis=1)
    first = tl.sum(tl.load(at + 2 * step, mask=inside, other=0.0) * factor, axis=1)
    second = tl.sum(tl.load(at + 3 * step, mask=inside, other=0.0) * factor, axis=1)
    total = tl.where(tl.arange(0, TILE) < NODES, total, 1.0)
    mean = first / total
    return top, total, mean, tl.maximum(second / total - mean * mean, 0.0)


@triton.jit
def pick(values, index, wanted):
    """The entry of `values` at `wanted`."""
    return tl.sum(tl.where(index == wanted, values, 0.0), axis=0)


@triton.jit
def divergence(a, top, total, mean, top_one, total_one, mean_one):
    """KL(a) from the sums at a and at 1. Differences are taken before anything is added up."""
    grown = (top - top_one) - (a - 1.0) * mean_one + tl.log(total / total_one)
    return (a - 1.0) * (mean - mean_one) - grown


@triton.jit
def coarse_strength(node, limit):
    """a of the coarse nodes: 1, then 1 + (a_T − 1) ρ^(7 − node), where ρ^6 is 1/64 or reaches 1.03."""
    reach = tl.maximum(limit - 1.0, 1e-30)
    rho = tl.exp(tl.minimum(tl.log(0.03 / reach) / 6.0, -0.6931472))
    power = tl.exp((node - (COARSE_NODES - 1)) * -tl.log(rho))
    a = 1.0 + (limit - 1.0) * power
    return tl.where(node == 0, 1.0, tl.where(node == COARSE_NODES - 1, limit, a))


@triton.jit
def inner_strength(node, low, high):
    """a of the inner nodes, evenly spaced in log(a − 1) from low to high; from 1, over six octaves."""
    reach = tl.maximum(high - 1.0, 1e-30)
    bottom = tl.where(low > 1.0, low - 1.0, reach / 64.0)
    share = tl.minimum(node.to(tl.float32) / (INNER_NODES - 1), 1.0)
    a = 1.0 + bottom * tl.exp(share * tl.log(reach / bottom))
    return tl.where(node >= INNER_NODES - 1, high, a)


@triton.jit(do_not_specialize=["splits"])
def refine_kernel(
    logits_ptr, mixed_ptr, table_ptr, first_ptr, budget_ptr, strength_ptr, centre_ptr, coarse_ptr,
    bracket_ptr, inner_ptr, vocab, splits,
    NODES: tl.constexpr, INNER: tl.constexpr, S_PAD: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """Brackets the strength, and sums the inner nodes. bracket [groups, 6]: low, high, whether a_T is inside,
    the centre of d, and A(1) of d as centred, in two parts: max and Σ e."""
    group, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = tl.load(table_ptr + group)
    budget = tl.load(budget_ptr + row).to(tl.float32)
    if budget < float("inf"):
        limit = tl.load(strength_ptr + group).to(tl.float32)
        top, total, mean, _ = node_moments(
            coarse_ptr + group * 4 * NODES * splits, splits, NODES, NODES, S_PAD
        )
        node = tl.arange(0, NODES)
        a = coarse_strength(node, limit)
        mean_one, top_one, total_one = pick(mean, node, 0), pick(top, node, 0), pick(total, node, 0)
        kl = divergence(a, top, total, mean, top_one, total_one, mean_one)
        obeys = (kl <= budget) | (node == 0)
        beyond = tl.min(tl.where(obeys, NODES, node), axis=0)
        inside = pick(obeys.to(tl.float32), node, NODES - 1)
        low = pick(a, node, tl.minimum(beyond, NODES - 1) - 1)
        high = pick(a, node, tl.minimum(beyond, NODES - 1))
        before = tl.load(centre_ptr + group)
        centre = before + mean_one
        moved = centre - before  # what the sum above really added
        if split == 0:
            out = bracket_ptr + group * 6
            tl.store(out, low)
            tl.store(out + 1, high)
            tl.store(out + 2, inside)
            tl.store(out + 3, centre)
            tl.store(out + 4, top_one - moved)
            tl.store(out + 5, total_one)
        if inside == 0:
            token = split * SPLIT + tl.arange(0, SPLIT)
            within = token < vocab
            first = tl.load(first_ptr + group)
            base = tl.load(logits_ptr + first * vocab + token, mask=within, other=float("-inf")).to(
                tl.float32
            )
            merged = tl.load(mixed_ptr + group * vocab + token, mask=within, other=0.0)
            direction = tl.where(within, merged - base - centre, 0.0)
            sums = inner_ptr + group * 4 * INNER * splits
            for index in range(INNER):
                a_node = inner_strength(split * 0 + index, low, high)
                node_sums(sums, index, base, direction, a_node, split, splits, INNER)


@triton.jit
def cubic(t, y0, y1, s0, s1):
    """Hermite's cubic on [0, 1] with values y and slopes s at the ends."""
    u = 1.0 - t
    return u * u * ((1.0 + 2.0 * t) * y0 + t * s0) + t * t * ((3.0 - 2.0 * t) * y1 - u * s1)


@triton.jit
def cubic_root(target, y0, y1, s0, s1):
    """t in [0, 1] up to which the rising cubic is at most `target`: counted on 256 points, twice."""
    points = (tl.arange(0, 256) + 1).to(tl.float32) / 256.0
    count = tl.sum((cubic(points, y0, y1, s0, s1) <= target).to(tl.float32), axis=0)
    coarse = count / 256.0
    finer = coarse + points / 256.0
    count = tl.sum((cubic(finer, y0, y1, s0, s1) <= target).to(tl.float32), axis=0)
    return tl.minimum(coarse + count / 65536.0, 1.0)


@triton.jit
def solve(
    bracket_ptr, inner_ptr, limit, budget, splits,
    INNER: tl.constexpr, TILE: tl.constexpr, S_PAD: tl.constexpr,
):  # fmt: skip
    """a* and the centre of d for one request."""
    low, high = tl.load(bracket_ptr), tl.load(bracket_ptr + 1)
    a_star = limit
    centre = tl.load(bracket_ptr + 3)
    if tl.load(bracket_ptr + 2) == 0:
        top_one, total_one = tl.load(bracket_ptr + 4), tl.load(bracket_ptr + 5)
        top, total, mean, variance = node_moments(inner_ptr, splits, INNER, TILE, S_PAD)
        node = tl.arange(0, TILE)
        a = inner_strength(node, low, high)
        kl = divergence(a, top, total, mean, top_one, total_one, 0.0)
        obeys = (kl <= budget) | (node >= INNER)
        kl = tl.maximum(kl, 1e-12)
        beyond = tl.min(tl.where(obeys, INNER, node), axis=0)
        above = tl.maximum(tl.minimum(beyond, INNER - 1), 1)
        below = above - 1
        slopes = (a - 1.0) * (a - 1.0) * variance / kl
        target = tl.log(budget * AIM)
        x0, x1 = tl.log(pick(a, node, below) - 1.0), tl.log(pick(a, node, above) - 1.0)
        y0, y1 = tl.log(pick(kl, node, below)), tl.log(pick(kl, node, above))
        width = x1 - x0
        most = 3.0 * tl.maximum(y1 - y0, 0.0)
        s0 = tl.minimum(pick(slopes, node, below) * width, most)
        s1 = tl.minimum(pick(slopes, node, above) * width, most)
        x = x0 + width * cubic_root(target, y0, y1, s0, s1)
        # under the lowest node KL is nearly quadratic
        x = tl.where(beyond == 0, x0 + tl.minimum(target - y0, 0.0) / 2.0, x)
        a_star = tl.minimum(1.0 + tl.exp(x), limit)
        a_star = tl.where(a_star >= 1.0, a_star, 1.0)
    return a_star, centre
