"""Gumbel noise of the Triton kernels against the torch reference: equal integers, close logarithms."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from trimtab.kernels.steering.gumbel import rng_keys, token_bits
from trimtab.kernels.triton.steering.gumbel import gumbel_from_bits, random_bits

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SEEDS = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 12345, 12345])
POSITIONS = torch.tensor([0, 1, 2**31 - 1, 2**31, 7, 0, 99])
ROWS, SPAN = 64, 64


@triton.jit(do_not_specialize=["rows", "vocab"])
def noise_kernel(seeds, positions, bits_out, noise_out, rows, vocab, ROWS: tl.constexpr, SPAN: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    tokens = tl.program_id(1) * SPAN + tl.arange(0, SPAN)[None, :]
    seed = tl.load(seeds + row, mask=row < rows, other=0)
    position = tl.load(positions + row, mask=row < rows, other=0)
    bits = random_bits(seed, position, tokens)
    offs, mask = row * vocab + tokens, (row < rows) & (tokens < vocab)
    tl.store(bits_out + offs, bits, mask=mask)
    tl.store(noise_out + offs, gumbel_from_bits(bits), mask=mask)


def noise(seeds: Tensor, positions: Tensor, vocab: int) -> tuple[Tensor, Tensor]:
    """(bits int32, Gumbel noise float32), [rows, vocab] each, for int64 seeds and positions [rows]."""
    bits = torch.empty(len(seeds), vocab, dtype=torch.int32, device=seeds.device)
    gumbel = torch.empty_like(bits, dtype=torch.float32)
    grid = (triton.cdiv(len(seeds), ROWS), triton.cdiv(vocab, SPAN))
    noise_kernel[grid](seeds, positions, bits, gumbel, len(seeds), vocab, ROWS=ROWS, SPAN=SPAN)
    return bits, gumbel


def test_random_bits_equal_the_reference() -> None:
    bits, _ = noise(SEEDS.to(DEVICE), POSITIONS.to(DEVICE), 1001)
    tokens = torch.arange(1001, dtype=torch.int32)
    assert torch.equal(bits.cpu(), token_bits(rng_keys(SEEDS, POSITIONS), tokens))


def test_gumbel_noise_is_finite_and_close_to_float64() -> None:
    bits, gumbel = noise(SEEDS.to(DEVICE), POSITIONS.to(DEVICE), 20_001)
    u = ((bits.cpu() & 0x7FFFFFFF).double() + 0.5) * 2.0**-31
    exact = -torch.log(-torch.log1p(-u.clamp(max=1 - 2.0**-24)))
    assert bool(gumbel.isfinite().all())
    # rounding u to 24 bits changes the noise by about the same relative error, and by more near the largest u
    is_accurate = u < 1 - 2.0**-14
    torch.testing.assert_close(gumbel.cpu().double()[is_accurate], exact[is_accurate], rtol=1e-3, atol=1e-4)


def test_tokens_are_sampled_with_their_probabilities() -> None:
    """Chi-square of 60,000 draws from 30 tokens, over positions of a seed and over seeds at a position."""
    vocab, draws = 30, 60_000
    probs = torch.linspace(0, 3, vocab).softmax(-1).double()
    for seeds, positions in (
        (torch.full((draws,), 5), torch.arange(draws)),
        (torch.arange(draws), torch.full((draws,), 70_000)),
    ):
        _, gumbel = noise(seeds.to(DEVICE), positions.to(DEVICE), vocab)
        chosen = (gumbel.cpu() + probs.log().float()).argmax(-1)
        expected = draws * probs
        counts = torch.bincount(chosen, minlength=vocab).double()
        chi_square = float(((counts - expected) ** 2 / expected).sum())
        assert 10 < chi_square < 60  # 29 degrees of freedom: p between 0.0005 and 0.9996
