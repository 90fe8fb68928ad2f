"""Sampling noise: uniform, uncorrelated between neighbours, a function of (seed, position, token) alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from trimtab.kernels.steering import gumbel as noise
from trimtab.kernels.steering.coefficients import SteeringCoefficients
from trimtab.kernels.steering.gumbel import gumbel, rng_keys, token_bits
from trimtab.kernels.steering.sampling import RowSampling
from trimtab.kernels.steering.state import SteeringState
from trimtab.kernels.steering.step import sample

UNLIKELY = 1e-6
"""p-value below which a test fails: a perfect source fails once in a million seeds."""
SIGMAS = 5.0
TOKENS = torch.arange(1000, dtype=torch.int32)
SEEDS = torch.tensor([0, 1, -1, 2**63 - 1, -(2**63), 2**32, 2**32 + 1, 2**31, -(2**31), 12345, 1 << 62])


def chi_square(counts: Tensor, expected: Tensor) -> float:
    """The probability that exact frequencies deviate from `expected` at least as much as `counts` do."""
    statistic = ((counts - expected).square() / expected).sum().double()
    freedom = torch.tensor((counts.numel() - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2))


def neighbours(kind: str, count: int = 256) -> Tensor:
    """Bits [count, 1000] whose neighbouring rows differ by one in seed, in position or in token id."""
    index, fixed = torch.arange(count), torch.full((count,), 17)
    if kind == "seeds":
        return token_bits(rng_keys(index, fixed), TOKENS)
    if kind == "positions":
        return token_bits(rng_keys(fixed, index), TOKENS)
    flat = token_bits(rng_keys(fixed[:1], fixed[:1]), torch.arange(count * 1000, dtype=torch.int32))
    return flat.view(1000, count).t()


KINDS = ["seeds", "positions", "tokens"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shift", [0, 8, 16, 24])
def test_every_byte_is_uniform(kind: str, shift: int) -> None:
    values = ((neighbours(kind) >> shift) & 0xFF).flatten()
    counts = torch.bincount(values, minlength=256)
    assert chi_square(counts, torch.full_like(counts, len(values)) / 256) > UNLIKELY


@pytest.mark.parametrize("kind", KINDS)
def test_every_bit_is_set_half_of_the_time(kind: str) -> None:
    x = neighbours(kind)
    shares = torch.stack([((x >> bit) & 1).float().mean() for bit in range(32)])
    assert float((shares - 0.5).abs().max()) <= SIGMAS / (2 * x.numel() ** 0.5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", [1, 2, 3, 16])
def test_neighbours_are_uncorrelated(kind: str, step: int) -> None:
    u = neighbours(kind).double()
    one, other = u[:-step].flatten(), u[step:].flatten()
    correlation = torch.corrcoef(torch.stack((one, other)))[0, 1]
    assert abs(float(correlation)) <= SIGMAS / len(one) ** 0.5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shift", [0, 13, 28])
def test_pairs_of_neighbours_are_uniform(kind: str, shift: int) -> None:
    nibble = (neighbours(kind) >> shift) & 15
    pairs = (16 * nibble[0::2] + nibble[1::2]).flatten()
    counts = torch.bincount(pairs, minlength=256)
    assert chi_square(counts, torch.full_like(counts, len(pairs)) / 256) > UNLIKELY


@pytest.mark.parametrize("kind", ["seeds", "positions"])
def test_one_flipped_input_bit_flips_every_output_bit_half_of_the_time(kind: str) -> None:
    index, fixed = torch.arange(100, 132), torch.full((32,), 17)
    for bit in range(64):
        flip = torch.tensor(1 << bit if bit < 63 else -(1 << 63))
        flipped = (index, fixed) if kind == "seeds" else (fixed, index)
        moved = (index ^ flip, fixed) if kind == "seeds" else (fixed, index ^ flip)
        changed = token_bits(rng_keys(*flipped), TOKENS) ^ token_bits(rng_keys(*moved), TOKENS)
        shares = torch.stack([((changed >> out) & 1).float().mean() for out in range(32)])
        assert float((shares - 0.5).abs().max()) <= 6 / (2 * changed.numel() ** 0.5), bit


@pytest.mark.parametrize("lag", [1, 233, 1597, 10_946, 28_657, 75_025])
def test_tokens_a_fibonacci_number_apart_are_uncorrelated(lag: int) -> None:
    """At these lags the multiples of the golden ratio that the mixer starts from are closest together."""
    streams = token_bits(
        rng_keys(torch.arange(8), torch.full((8,), 17)), torch.arange(100_000, dtype=torch.int32)
    )
    changed = streams[:, lag:] ^ streams[:, :-lag]
    shares = torch.stack([((changed >> out) & 1).float().mean() for out in range(32)])
    assert float((shares - 0.5).abs().max()) <= SIGMAS / (2 * changed.numel() ** 0.5)


def test_two_streams_are_never_shifted_copies_of_each_other() -> None:
    """Even if their first keys are a few token steps apart; 50,000² / 2³² ≈ 0.6 values match by chance."""
    tokens = torch.arange(50_000, dtype=torch.int32)
    first = torch.tensor([0, noise.GOLDEN, 77 * noise.GOLDEN & 0x7FFFFFFF, 0], dtype=torch.int32)
    streams = token_bits(torch.stack((first, torch.tensor([1, 2, -3, 1 << 30], dtype=torch.int32))), tokens)
    for one in range(4):
        for other in range(one):
            assert int(torch.isin(streams[one], streams[other]).sum()) <= 10


def splitmix_finalizer(x: int) -> int:
    """The finaliser of splitmix64, in integers modulo 2⁶⁴."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def reference_bits(seed: int, position: int, token: int) -> int:
    """The bits by the documented formula, in integers modulo 2³²; they must never change, so seeds replay."""
    key = splitmix_finalizer((seed + 0x9E3779B97F4A7C15) % 2**64)
    key = splitmix_finalizer(key ^ ((position * 0xD1342543DE82EF95 + 0x632BE59BD9B4E019) % 2**64))
    x = (token * 0x9E3779B1 + key % 2**32) % 2**32
    x = (((x ^ (x >> 16)) * 0x21F0AAAD) + (key >> 32)) % 2**32
    x = (x ^ (x >> 15)) * 0x735A2D97 % 2**32
    return x ^ (x >> 15)


def test_bits_match_the_documented_mixer() -> None:
    tokens = [0, 1, 2, 31, 49_151, 151_935, 2**31 - 1]
    for position in (0, 1, 4095, 100_000):
        got = token_bits(
            rng_keys(SEEDS, torch.full_like(SEEDS, position)), torch.tensor(tokens, dtype=torch.int32)
        )
        exact = [
            [reference_bits(seed % 2**64, position, token) for token in tokens] for seed in SEEDS.tolist()
        ]
        assert (got.to(torch.int64) & 0xFFFFFFFF).tolist() == exact


def test_all_64_bit_seeds_give_distinct_streams() -> None:
    streams = token_bits(rng_keys(SEEDS, torch.zeros_like(SEEDS)), TOKENS)
    correlations = torch.corrcoef(streams.double()) - torch.eye(len(SEEDS)).double()
    assert float(correlations.abs().max()) <= SIGMAS / len(TOKENS) ** 0.5


def test_a_seed_beyond_int64_wraps_to_its_low_64_bits() -> None:
    state = SteeringState(7)
    for row, seed in enumerate((2**63 + 5, 5 - 2**63, 2**64 - 1, -1, 2**64 + 3, 3)):
        state.add_request(row, SteeringCoefficients(), (), RowSampling(temperature=1.0, seed=seed))
    column = state.seeds[:6].tolist()  # the state may have spare rows
    assert column == [5 - 2**63, 5 - 2**63, -1, -1, 3, 3]


def test_noise_does_not_depend_on_vocabulary_size_or_batch() -> None:
    positions = 7 * torch.arange(len(SEEDS))
    full_noise = gumbel(SEEDS, positions, 4099)
    for vocab in (1, 7, 41, 1000):
        assert torch.equal(gumbel(SEEDS, positions, vocab), full_noise[:, :vocab])
    for row in range(len(SEEDS)):
        assert torch.equal(gumbel(SEEDS[row : row + 1], positions[row : row + 1], 4099)[0], full_noise[row])
    order = torch.arange(len(SEEDS)).flip(0)
    assert torch.equal(gumbel(SEEDS[order], positions[order], 4099), full_noise[order])


def test_noise_depends_on_seed_and_on_position() -> None:
    zero, one = torch.zeros(1, dtype=torch.int64), torch.ones(1, dtype=torch.int64)
    reference = gumbel(zero, zero, 99)
    assert float((gumbel(one, zero, 99) == reference).float().mean()) < 0.1
    assert float((gumbel(zero, one, 99) == reference).float().mean()) < 0.1
    assert not torch.equal(gumbel(zero, one, 99), gumbel(one, zero, 99))


def test_gumbel_noise_is_finite_and_exact_at_both_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """As close to −log(−log(1 − u)) as float32 allows for a 31-bit u."""
    top = 2**31 - 1
    crafted = [0, 1, 2, 3, 1000, 2**20, 2**24 - 1, 2**24 + 1, 2**30, top - 200, top - 64, top - 1, top]
    crafted += [-1, -(2**31), 1 - 2**31]
    bits = torch.tensor([crafted], dtype=torch.int32)
    monkeypatch.setattr(noise, "token_bits", lambda keys, tokens: bits)
    got = gumbel(torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64), len(crafted))[0]
    u = ((bits[0].to(torch.int64) & top).double() + 0.5) * 2.0**-31

    def exact(u: Tensor) -> Tensor:
        return -(-(-u).log1p()).log()

    above = exact(u * (1 - 2.0**-22))
    below = exact((u * (1 + 2.0**-22)).clamp(max=1 - 2.0**-25))
    slack = 1e-6 * (1 + exact(u).abs())
    assert bool(got.isfinite().all())
    assert bool((got <= above + slack).all())
    assert bool((got >= below - slack).all())


def test_gumbel_noise_has_the_gumbel_distribution() -> None:
    values = gumbel(torch.arange(200), torch.zeros(200, dtype=torch.int64), 1000).flatten().double()
    counts = torch.histc((-(-values).exp()).exp(), 200, 0, 1)
    assert chi_square(counts, torch.full_like(counts, len(values) / 200)) > UNLIKELY


def draw_tokens(scores: Tensor, count: int, over: str, settings: RowSampling) -> Tensor:
    """Sample `count` tokens from one row of scores, over consecutive seeds or positions."""
    index, fixed = torch.arange(count), torch.full((count,), 3)
    columns = {
        name: torch.full((count,), value)
        for name, value in (
            ("temperature", settings.temperature),
            ("top_p", settings.top_p),
            ("min_p", settings.min_p),
        )
    }
    columns["top_k"] = torch.full((count,), settings.top_k)
    columns["seed"] = index if over == "seeds" else fixed
    return sample(scores.expand(count, -1), columns, fixed if over == "seeds" else index)


def expected_probabilities(scores: Tensor, settings: RowSampling) -> Tensor:
    """Exact sampling probabilities under `settings`, by sorting in float64."""
    chances = (scores.double() / settings.temperature).softmax(-1)
    if settings.top_k:
        chances[chances < chances.sort(descending=True).values[settings.top_k - 1]] = 0
        chances /= chances.sum()
    mass_above = torch.stack([chances[chances > chance].sum() for chance in chances])
    chances[mass_above >= settings.top_p] = 0
    chances[chances < settings.min_p * chances.max()] = 0
    return chances / chances.sum()


@pytest.mark.parametrize("over", ["seeds", "positions"])
@pytest.mark.parametrize(
    "how",
    [
        RowSampling(temperature=1.0),
        RowSampling(temperature=0.6, top_p=0.9),
        RowSampling(temperature=1.7, top_k=12, min_p=0.05),
        RowSampling(temperature=1.2, top_k=40, top_p=0.8, min_p=0.02),
    ],
)
def test_tokens_are_sampled_with_their_exact_probabilities(over: str, how: RowSampling) -> None:
    scores = 2 * torch.randn(50, generator=torch.Generator().manual_seed(4))
    chances = expected_probabilities(scores, how)
    count = 40_000
    counts = torch.bincount(draw_tokens(scores, count, over, how), minlength=50)
    assert not counts[chances == 0].any()
    often = chances * count >= 5
    rest = torch.stack((counts[~often].sum().double(), (count * chances[~often]).sum()))
    observed = torch.cat((counts[often].double(), rest[:1]))
    expected = torch.cat((count * chances[often], rest[1:]))
    keep = expected > 0
    assert chi_square(observed[keep], expected[keep]) > UNLIKELY


@pytest.mark.parametrize("over", ["seeds", "positions"])
def test_successive_samples_are_independent(over: str) -> None:
    drawn = draw_tokens(torch.zeros(7), 40_000, over, RowSampling(temperature=1.0))
    pairs = torch.bincount(7 * drawn[:-1:2] + drawn[1::2], minlength=49)
    assert chi_square(pairs, torch.full((49,), 20_000 / 49)) > UNLIKELY
