"""Gumbel noise for sampling, a function of (request seed, position, token id) alone.

A sample therefore does not depend on batch, tiling or device count. The bits come from a counter-based mixer
of two multiplications in 32-bit arithmetic (on a CPU, Philox costs more than a decode step of a small model).
A 64-bit finaliser turns (seed, position) into two 32-bit keys; a token's bits are

    x = token · 0x9E3779B1 + key0;  x ^= x≫16;  x ·= 0x21F0AAAD;  x += key1;
    x ^= x≫15;  x ·= 0x735A2D97;  x ^= x≫15

with Wellons' low-bias multipliers; key1 enters between the two rounds, so that two streams are never shifted
copies of each other. Gumbel noise is g = −log E, E = −log(1 − u), u = (31 bits + ½) 2⁻³¹: finite at both
ends.
"""

from __future__ import annotations

import torch
from torch import Tensor


def wrap_int64(word: int) -> int:
    """The low 64 bits of `word` as a signed int64."""
    word &= (1 << 64) - 1
    return word - (1 << 64) if word >> 63 else word


GOLDEN = -1640531535  # 0x9E3779B1 as int32
MIX_MUL_1, MIX_MUL_2 = 0x21F0AAAD, 0x735A2D97
SEED_INC, POSITION_INC = wrap_int64(0x9E3779B97F4A7C15), 0x632BE59BD9B4E019
POSITION_FACTOR = wrap_int64(0xD1342543DE82EF95)
FINAL_MUL_1, FINAL_MUL_2 = wrap_int64(0xBF58476D1CE4E5B9), wrap_int64(0x94D049BB133111EB)
U_STEP, U_MAX = 2.0**-31, 1 - 2.0**-24
"""Spacing of u, and the largest float32 below 1."""


def rng_keys(seeds: Tensor, positions: Tensor) -> Tensor:
    """Two 32-bit keys [2, rows] int32 from 64-bit seeds and positions [rows], by a splitmix64 finaliser."""
    x = _splitmix64(seeds + SEED_INC)
    x = _splitmix64(x ^ (positions * POSITION_FACTOR + POSITION_INC))
    return torch.stack((_low_int32(x), _low_int32(x >> 32)))


def token_bits(keys: Tensor, token_ids: Tensor) -> Tensor:
    """32 random bits [rows, tokens] int32 for keys [2, rows] and token ids [tokens] int32."""
    x = (token_ids * GOLDEN)[None] + keys[0][:, None]
    x ^= (x >> 16) & 0xFFFF
    x *= MIX_MUL_1
    x += keys[1][:, None]
    x ^= (x >> 15) & 0x1FFFF
    x *= MIX_MUL_2
    x ^= (x >> 15) & 0x1FFFF
    return x


def gumbel(seeds: Tensor, positions: Tensor, vocab_size: int, vocab_start: int = 0) -> Tensor:
    """Standard Gumbel noise [rows, vocab] float32; seeds, positions [rows] int64; ids from `vocab_start`."""
    token_ids = torch.arange(vocab_start, vocab_start + vocab_size, dtype=torch.int32, device=seeds.device)
    u = (token_bits(rng_keys(seeds, positions), token_ids) & 0x7FFFFFFF).float().add_(0.5).mul_(U_STEP)
    return u.clamp_(max=U_MAX).neg_().log1p_().neg_().log_().neg_()


def _splitmix64(x: Tensor) -> Tensor:
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * FINAL_MUL_1
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * FINAL_MUL_2
    return x ^ ((x >> 31) & 0x1FFFFFFFF)


def _low_int32(x: Tensor) -> Tensor:
    """The low 32 bits as int32."""
    low = x & 0xFFFFFFFF
    return torch.where(low >= 1 << 31, low - (1 << 32), low).to(torch.int32)
