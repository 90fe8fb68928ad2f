"""The kernels' noise is that of the torch reference: the same integers, and logarithms as exact."""

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
    at, inside = row * vocab + tokens, (row < rows) & (tokens < vocab)
    tl.store(bits_out + at, bits, mask=inside)
    tl.store(noise_out + at, gumbel_from_bits(bits), mask=inside)


def noise(seeds: Tensor, positions: Tensor, vocab: int) -> tuple[Tensor, Tensor]:
    """(bits int32, Gumbel noise float32), [rows, vocab] each, for int64 seeds and positions [rows]."""
    bits = torch.empty(len(seeds), vocab, dtype=torch.int32, device=seeds.device)
    drawn = torch.empty_like(bits, dtype=torch.float32)
    grid = (triton.cdiv(len(seeds), ROWS), triton.cdiv(vocab, SPAN))
    noise_kernel[grid](seeds, positions, bits, drawn, len(seeds), vocab, ROWS=ROWS, SPAN=SPAN)
    return bits, drawn


def test_random_bits_are_those_of_the_reference() -> None:
    found, _ = noise(SEEDS.to(DEVICE), POSITIONS.to(DEVICE), 1001)
    tokens = torch.arange(1001, dtype=torch.int32)
    assert torch.equal(found.cpu(), token_bits(rng_keys(SEEDS, POSITIONS), tokens))


def test_gumbel_noise_is_as_exact_as_float32_and_finite() -> None:
    bits, drawn = noise(SEEDS.to(DEVICE), POSITIONS.to(DEVICE), 20_001)
    u = ((bits.cpu() & 0x7FFFFFFF).double() + 0.5) * 2.0**-31
    exact = -torch.log(-torch.log1p(-u.clamp(max=1 - 2.0**-24)))
    assert bool(drawn.isfinite().all())
    # u is rounded to 24 bits, which moves the noise by that share of it, and more only near the largest u
    near = u < 1 - 2.0**-14
    torch.testing.assert_close(drawn.cpu().double()[near], exact[near], rtol=1e-3, atol=1e-4)


def test_tokens_are_sampled_with_their_probabilities() -> None:
    """Chi-square of 60,000 draws from 30 tokens, by positions of one seed and by seeds at one position."""
    vocab, draws = 30, 60_000
    chances = torch.linspace(0, 3, vocab).softmax(-1).double()
    for seeds, positions in (
        (torch.full((draws,), 5), torch.arange(draws)),
        (torch.arange(draws), torch.full((draws,), 70_000)),
    ):
        _, drawn = noise(seeds.to(DEVICE), positions.to(DEVICE), vocab)
        chosen = (drawn.cpu() + chances.log().float()).argmax(-1)
        expected = draws * chances
        counts = torch.bincount(chosen, minlength=vocab).double()
        chi_square = float(((counts - expected) ** 2 / expected).sum())
        assert 10 < chi_square < 60  # 29 degrees of freedom: p between 0.0005 and 0.9996
