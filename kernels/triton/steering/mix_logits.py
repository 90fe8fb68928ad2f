"""The mix: one pass over the logits of a request's branches, in splits of the vocabulary of one length.

Rows are looped over with the split held in registers, so that neither their number nor the numbers of other
requests change what is computed. Each split leaves per row (max, Σ exp), the mixed logits, OPAD's contrast
for the next step, whether anything was not finite, and in a trust region the sums of the coarse strengths.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .trust_region import coarse_strength, node_sums


@triton.jit
def not_finite(values, inside):
    """1 where some entry is NaN or infinite, else 0: zero times it is no number."""
    spoiled = tl.sum(tl.where(inside, values, 0.0) * 0.0, axis=0)
    return (spoiled != spoiled).to(tl.int32)


@triton.jit(do_not_specialize=["splits", "named"])
def mix_kernel(
    logits_ptr, table_ptr, first_ptr, count_ptr, coefficient_ptr, strength_ptr, steps_ptr, delay_ptr,
    slot_ptr, contrast_ptr, budget_ptr, mixed_ptr, row_max_ptr, row_sum_ptr, row_allowed_ptr, broken_ptr,
    centre_ptr, coarse_ptr, vocab, splits, named,
    DELAYED: tl.constexpr, LIMITED: tl.constexpr, NODES: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """named: ids at or beyond it are never chosen; row_allowed is each row's max below it."""
    group, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row = tl.load(table_ptr + group)
    first, count = tl.load(first_ptr + group), tl.load(count_ptr + group)
    token = split * SPLIT + tl.arange(0, SPLIT)
    inside = token < vocab
    mixed = tl.zeros([SPLIT], tl.float32)
    centre = tl.zeros([], tl.float32)
    for index in range(count):
        place = first + index
        z = tl.load(logits_ptr + place * vocab + token, mask=inside, other=float("-inf")).to(tl.float32)
        coefficient = tl.load(coefficient_ptr + place)
        mixed += coefficient * z
        centre += coefficient * tl.load(logits_ptr + place * vocab).to(tl.float32)
        top = tl.max(z, axis=0)
        tl.store(row_max_ptr + place * splits + split, top)
        tl.store(row_sum_ptr + place * splits + split, tl.sum(tl.exp(z - top), axis=0))
        allowed = top
        if (split + 1) * SPLIT > named:
            allowed = tl.max(tl.where(token < named, z, float("-inf")), axis=0)
        tl.store(row_allowed_ptr + place * splits + split, allowed)
    # what is no number in a row is none in the mix, whatever its share
    tl.store(broken_ptr + group * splits + split, not_finite(mixed, inside))
    if DELAYED:
        delay = tl.load(delay_ptr + row)
        if delay != 0:
            z0 = tl.load(logits_ptr + first * vocab + token, mask=inside, other=0.0).to(tl.float32)
            z1 = tl.load(logits_ptr + (first + 1) * vocab + token, mask=inside, other=0.0).to(tl.float32)
            kept = contrast_ptr + tl.load(slot_ptr + row) * vocab + token
            later = tl.load(steps_ptr + row) > 0
            mixed += tl.where(later, delay.to(tl.float32) * tl.load(kept, mask=inside, other=0.0), 0.0)
            tl.debug_barrier()  # what is kept is read before it is replaced
            tl.store(kept, z1 - z0, mask=inside)
    tl.store(mixed_ptr + group * vocab + token, mixed, mask=inside)
    centre -= tl.load(logits_ptr + first * vocab).to(tl.float32)
    tl.store(centre_ptr + group, centre, mask=split == 0)
    if LIMITED:
        if tl.load(budget_ptr + row) < float("inf"):
            limit = tl.load(strength_ptr + group).to(tl.float32)
            base = tl.load(logits_ptr + first * vocab + token, mask=inside, other=float("-inf")).to(
                tl.float32
            )
            direction = tl.where(inside, mixed - base - centre, 0.0)
            sums = coarse_ptr + group * 4 * NODES * splits
            for node in range(NODES):
                a = coarse_strength(split * 0 + node, limit)
                node_sums(sums, node, base, direction, a, split, splits, NODES)
