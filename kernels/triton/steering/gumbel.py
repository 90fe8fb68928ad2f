"""Gumbel noise as a function of (request seed, position, token id), from the same random integers as
`kernels.steering.gumbel`.

log1p(−u) is computed by Kahan's method: with w = 1 − u rounded, −log(1 − u) = u · log(w) / (w − 1), or u if
w = 1. The integers are equal on all devices; the logarithms depend on the device.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ...steering import gumbel

GOLDEN = tl.constexpr(gumbel.GOLDEN)
MIX_MUL_1, MIX_MUL_2 = tl.constexpr(gumbel.MIX_MUL_1), tl.constexpr(gumbel.MIX_MUL_2)
SEED_INC, POSITION_INC = tl.constexpr(gumbel.SEED_INC), tl.constexpr(gumbel.POSITION_INC)
POSITION_FACTOR = tl.constexpr(gumbel.POSITION_FACTOR)
FINAL_MUL_1, FINAL_MUL_2 = tl.constexpr(gumbel.FINAL_MUL_1), tl.constexpr(gumbel.FINAL_MUL_2)
U_STEP, U_MAX = tl.constexpr(gumbel.U_STEP), tl.constexpr(gumbel.U_MAX)


@triton.jit
def splitmix64(x):
    """The finaliser of splitmix64, int64 → int64."""
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * FINAL_MUL_1
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * FINAL_MUL_2
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


@triton.jit
def random_bits(seed, position, tokens):
    """32 random bits for each int32 token; seed and position are int64."""
    key = splitmix64(splitmix64(seed + SEED_INC) ^ (position * POSITION_FACTOR + POSITION_INC))
    x = tokens * GOLDEN + key.to(tl.int32)
    x = (x ^ ((x >> 16) & 0xFFFF)) * MIX_MUL_1 + (key >> 32).to(tl.int32)
    x = (x ^ ((x >> 15) & 0x1FFFF)) * MIX_MUL_2
    return x ^ ((x >> 15) & 0x1FFFF)


@triton.jit
def gumbel_from_bits(bits):
    """Standard Gumbel noise, float32 and finite, from int32 random bits."""
    u = tl.minimum(((bits & 0x7FFFFFFF).to(tl.float32) + 0.5) * U_STEP, U_MAX)
    one_minus_u = 1.0 - u
    exponential = tl.where(
        one_minus_u == 1.0,
        u,
        u * (tl.log(one_minus_u) / tl.where(one_minus_u == 1.0, 1.0, one_minus_u - 1.0)),
    )
    return -tl.log(exponential)


@triton.jit
def gumbel_noise(seed, position, tokens):
    """Standard Gumbel noise, float32, for each int32 token."""
    return gumbel_from_bits(random_bits(seed, position, tokens))
