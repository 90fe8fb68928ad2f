"""Gumbel noise from (request seed, position, token id) alone, bit for bit the integers of
`kernels.steering.gumbel`.

The logarithm near 1 is Kahan's: with w = 1 − u rounded, −log(1 − u) = u · log(w) / (w − 1), or u where w
is 1. Integers are equal everywhere; logarithms are those of the machine.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...steering import gumbel

GOLDEN = tl.constexpr(gumbel.GOLDEN)
FIRST, SECOND = tl.constexpr(gumbel.FIRST), tl.constexpr(gumbel.SECOND)
SEED_STEP, POSITION_STEP = tl.constexpr(gumbel.SEED_STEP), tl.constexpr(gumbel.POSITION_STEP)
POSITION_FACTOR = tl.constexpr(gumbel.POSITION_FACTOR)
FINAL_FIRST, FINAL_SECOND = tl.constexpr(gumbel.FINAL_FIRST), tl.constexpr(gumbel.FINAL_SECOND)
STEP, MOST = tl.constexpr(gumbel.STEP), tl.constexpr(gumbel.MOST)


@triton.jit
def finalise(x):
    """Splitmix64's finaliser of an int64."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * FINAL_FIRST
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * FINAL_SECOND
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


@triton.jit
def random_bits(seed, position, tokens):
    """32 random bits for each of the int32 tokens, for int64 seed and position."""
    key = finalise(finalise(seed + SEED_STEP) ^ (position * POSITION_FACTOR + POSITION_STEP))
    x = tokens * GOLDEN + key.to(tl.int32)
    x = (x ^ ((x >> 16) & 0xFFFF)) * FIRST + (key >> 32).to(tl.int32)
    x = (x ^ ((x >> 15) & 0x1FFFF)) * SECOND
    return x ^ ((x >> 15) & 0x1FFFF)


@triton.jit
def gumbel_of(bits):
    """Standard Gumbel noise, float32 and finite, of int32 random bits."""
    u = tl.minimum(((bits & 0x7FFFFFFF).to(tl.float32) + 0.5) * STEP, MOST)
    rest = 1.0 - u
    exponential = tl.where(rest == 1.0, u, u * (tl.log(rest) / tl.where(rest == 1.0, 1.0, rest - 1.0)))
    return -tl.log(exponential)


@triton.jit
def gumbel_at(seed, position, tokens):
    """Standard Gumbel noise, float32, for each of the int32 tokens."""
    return gumbel_of(random_bits(seed, position, tokens))
