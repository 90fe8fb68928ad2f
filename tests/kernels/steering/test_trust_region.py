"""The trust region stays within the KL budget and uses all of it."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from trimtab.kernels.distributed.vocab_parallel import UnshardedVocab
from trimtab.kernels.steering import trust_region
from trimtab.kernels.steering.trust_region import kl_divergence, moments, row_sum, solve_kl_budget

if TYPE_CHECKING:
    from collections.abc import Callable

property_settings = settings(deadline=None, derandomize=True, max_examples=150)
BranchPair = tuple[Tensor, Tensor]


def gaussian(vocab: int, generator: torch.Generator) -> BranchPair:
    return 3 * torch.randn(vocab, generator=generator), torch.randn(vocab, generator=generator)


def student(vocab: int, generator: torch.Generator) -> BranchPair:
    """Heavy tails: Student's t with 4 degrees of freedom."""
    squares = torch.randn(2, 4, vocab, generator=generator).square().mean(1)
    base, direction = torch.randn(2, vocab, generator=generator) / squares.sqrt()
    return 2 * base, direction


def one_dominant_token(vocab: int, generator: torch.Generator) -> BranchPair:
    base, direction = gaussian(vocab, generator)
    base[3] += 25
    return base, direction


def flat(vocab: int, generator: torch.Generator) -> BranchPair:
    return torch.zeros(vocab), 0.05 * torch.randn(vocab, generator=generator)


def far_apart(vocab: int, generator: torch.Generator) -> BranchPair:
    """Very different branches, with some tokens almost excluded by one of them."""
    base, direction = gaussian(vocab, generator)
    direction *= 4
    direction[::5] += 12
    direction[1::7] -= 15
    return base, direction


def identical(vocab: int, generator: torch.Generator) -> BranchPair:
    """The same branches up to a constant, by which raw logits may differ."""
    return 3 * torch.randn(vocab, generator=generator), torch.full((vocab,), 7.3)


def with_offset(vocab: int, generator: torch.Generator) -> BranchPair:
    """Raw logits far from 0: constants must not cost precision."""
    base, direction = gaussian(vocab, generator)
    return base - 60, direction + 20


FAMILIES = (gaussian, student, one_dominant_token, flat, far_apart, identical, with_offset)
VOCABULARIES = (7, 41, 1000, 4097)


def exact_kl(base: Tensor, direction: Tensor, a: float) -> tuple[float, float]:
    """KL(π_a ‖ π_1) in float64 by its definition, and d KL / d log(a − 1)."""
    base, direction = base.double(), direction.double()
    near, far = (base + direction).log_softmax(-1), (base + a * direction).log_softmax(-1)
    weights = far.exp()
    mean = (weights * direction).sum()
    variance = (weights * (direction - mean).square()).sum()
    return float((weights * (far - near)).sum()), float((a - 1) ** 2 * variance)


def bisection(base: Tensor, direction: Tensor, limit: float, budget: float) -> float:
    if exact_kl(base, direction, limit)[0] <= budget:
        return limit
    low, high = 0.0, limit - 1
    for _ in range(100):
        middle = (low + high) / 2
        inside = exact_kl(base, direction, 1 + middle)[0] <= budget
        low, high = (middle, high) if inside else (low, middle)
    return 1 + low


def max_rounding_error(base: Tensor, direction: Tensor, a: float) -> float:
    """Rounding error of float32 scores b + a d, and so of A(a): half an ulp of b, of a d and of their sum."""
    return 2**-23 * float((base.abs() + a * direction.abs()).max())


def solve_strength(base: Tensor, direction: Tensor, limit: float, budget: float) -> tuple[float, float]:
    a, kl = solve_kl_budget(
        base[None], direction[None], *torch.tensor([[limit], [budget]], dtype=torch.float64)
    )
    return float(a), float(kl)


cases = {
    "family": st.sampled_from(FAMILIES),
    "vocab": st.sampled_from(VOCABULARIES),
    "excess": st.floats(-3, 2.9995).map(lambda power: 10**power - 1e-3),
    "budget": st.floats(-3, 1.3).map(lambda power: 10**power),
    "seed": st.integers(0, 2**32),
}


@property_settings
@given(**cases)
def test_the_kl_stays_within_the_budget(
    family: Callable[[int, torch.Generator], BranchPair], vocab: int, excess: float, budget: float, seed: int
) -> None:
    base, direction = family(vocab, torch.Generator().manual_seed(seed))
    a, kl = solve_strength(base, direction, 1 + excess, budget)
    exact, _ = exact_kl(base, direction, a)
    assert 1 <= a <= 1 + excess
    assert exact <= budget + 1e-4
    assert kl == pytest.approx(exact, abs=1e-4 + max_rounding_error(base, direction, a))


@property_settings
@given(**cases)
def test_the_strength_is_the_largest_within_the_budget(
    family: Callable[[int, torch.Generator], BranchPair], vocab: int, excess: float, budget: float, seed: int
) -> None:
    """Within 2e-3 of a − 1, or of KL where KL hardly changes with a."""
    base, direction = family(vocab, torch.Generator().manual_seed(seed))
    limit = 1 + excess
    a, _ = solve_strength(base, direction, limit, budget)
    best = bisection(base, direction, limit, budget)
    reached, slope = exact_kl(base, direction, best)
    if slope >= reached:
        assert a - 1 == pytest.approx(best - 1, rel=2e-3, abs=1e-9)
    else:
        assert exact_kl(base, direction, a)[0] == pytest.approx(reached, rel=2e-3, abs=1e-5)


@property_settings
@given(**{**cases, "budget": st.just(1e30)})
def test_with_an_infinite_budget_the_strength_is_the_requested_one(
    family: Callable[[int, torch.Generator], BranchPair], vocab: int, excess: float, budget: float, seed: int
) -> None:
    base, direction = family(vocab, torch.Generator().manual_seed(seed))
    assert solve_strength(base, direction, 1 + excess, budget)[0] == 1 + excess


@pytest.mark.parametrize("limit", [1.0, 1.5, 5.6487, 1000.0])
def test_identical_branches_are_never_limited(limit: float) -> None:
    base, direction = identical(4097, torch.Generator().manual_seed(0))
    assert solve_strength(base, direction, limit, 1e-3) == (limit, pytest.approx(0, abs=1e-4))


def many_rows(vocab: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Bases, directions, limits and budgets of every family at every strength."""
    generator = torch.Generator().manual_seed(vocab)
    settings_ = [(limit, budget) for limit in (1.9347, 5.6487, 100.0, 1000.0) for budget in (0.01, 0.2, 2.0)]
    rows = [(*family(vocab, generator), *pair) for family in FAMILIES for pair in settings_]
    base, direction = (torch.stack([row[i] for row in rows]) for i in (0, 1))
    limit, budget = (torch.tensor([row[i] for row in rows], dtype=torch.float64) for i in (2, 3))
    return base, direction, limit, budget


@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_rows_solved_together_have_the_same_bits_as_alone(vocab: int) -> None:
    rows = many_rows(vocab)
    together = torch.stack(solve_kl_budget(*rows))
    alone = [
        torch.stack(solve_kl_budget(*(column[i : i + 1] for column in rows))) for i in range(len(rows[0]))
    ]
    assert torch.equal(together, torch.cat(alone, 1))


@pytest.fixture
def sweeps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Records the number of rows of each pass over the vocabulary."""
    rows_per_sweep: list[int] = []

    def counted(
        base: Tensor, direction: Tensor, a: Tensor, *shard: UnshardedVocab
    ) -> tuple[Tensor, Tensor, Tensor]:
        rows_per_sweep.append(len(a))
        return moments(base, direction, a, *shard)

    monkeypatch.setattr(trust_region, "moments", counted)
    return rows_per_sweep


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_non_finite_row_gets_strength_one_and_does_not_affect_others(
    value: float, sweeps: list[int]
) -> None:
    rows = many_rows(41)
    well = torch.stack(solve_kl_budget(*rows))
    rows[1][::2, 5] = value
    ill = torch.stack(solve_kl_budget(*rows))
    assert torch.equal(ill[:, 1::2], well[:, 1::2])
    assert bool((ill[0, ::2] == 1).all())
    assert bool(ill[1, ::2].isnan().all())
    sweeps.clear()
    solve_kl_budget(*(column[:1] for column in rows))
    assert len(sweeps) == 2


@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_half_of_the_limited_rows_need_at_most_six_sweeps(vocab: int, sweeps: list[int]) -> None:
    """A sweep is one pass over the vocabulary; no row needs more than a third of MAX_ITERS."""
    rows, needed = many_rows(vocab), []
    for i, limit in enumerate(rows[2].tolist()):
        sweeps.clear()
        a, _ = solve_kl_budget(*(column[i : i + 1] for column in rows))
        if float(a) < limit:
            needed.append(len(sweeps))
        else:
            assert len(sweeps) == 2
    assert len(needed) > 30
    assert statistics.median(needed) <= 6
    assert max(needed) <= trust_region.MAX_ITERS // 3


@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize("a", [1.0, 1.5, 5.6487, -2.0])
def test_kl_divergence_matches_its_definition(vocab: int, a: float) -> None:
    base, direction, _, _ = many_rows(vocab)
    got = kl_divergence(base, direction, torch.full((len(base),), a, dtype=torch.float64))
    exact = [exact_kl(b, d, a)[0] for b, d in zip(base, direction, strict=True)]
    assert got.tolist() == pytest.approx(exact, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("width", [1, 7, 512, 513, 4097])
def test_row_sum_is_batch_invariant_and_close_to_the_exact_sum(width: int) -> None:
    x = torch.rand(9, width, generator=torch.Generator().manual_seed(width))
    total = row_sum(x)
    assert torch.equal(total, torch.cat([row_sum(row[None]) for row in x]))
    rough, exact = x.sum(-1).double(), x.double().sum(-1)
    # chunks of 512 in float32, then float64: at most one rounding worse than float32 throughout
    assert float((total - exact).abs().max()) <= 2 * float((rough - exact).abs().max()) + 2**-23 * width
