"""The optimisation loop of Amulet and MATO equals a scalar recurrence with the published values."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor
from trimtab.kernels.steering.closed_form import (
    reward_strength,
    strength,
    unrolled_loop,
    unrolled_reward_loop,
)

property_settings = settings(deadline=None, derandomize=True, max_examples=120)

ITERATIONS = (1, 10, 20, 40, 60, 80, 1000)
AMULET = ("1.9524", "3.8976", "4.5665", "5.2474", "5.6487", "5.9343", "8.4543")
MATO = ("1.4545", "1.8173", "1.8700", "1.9078", "1.9247", "1.9347", "1.9815")


@pytest.mark.parametrize(("iterations", "printed"), [*zip(ITERATIONS, AMULET, strict=True)])
def test_strength_at_amulets_hyperparameters_matches_the_published_table(
    iterations: int, printed: str
) -> None:
    assert f"{strength(2, 2, 10, iterations):.4f}" == printed


@pytest.mark.parametrize(("iterations", "printed"), [*zip(ITERATIONS, MATO, strict=True)])
def test_strength_at_matos_hyperparameters_matches_the_published_table(iterations: int, printed: str) -> None:
    assert f"{strength(0.5, 1, 10, iterations):.4f}" == printed


def random_branches(seed: int, vocab: int, objectives: int, spread: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities of a base [vocab], and the merged anchor Σ w_k l_k, which is not normalised."""
    generator = torch.Generator().manual_seed(seed)
    logits = spread * torch.randn(objectives + 1, vocab, generator=generator, dtype=torch.float64)
    weights = torch.rand(objectives, generator=generator, dtype=torch.float64)
    base, *objective_logprobs = logits.log_softmax(-1)
    return base, (weights / weights.sum() @ torch.stack(objective_logprobs))


def max_logprob_error(policy: Tensor, base: Tensor, anchor: Tensor, a: float) -> float:
    """Largest |Δ log π| between the loop's result and b + a (p − b), both centred."""
    closed = base + a * (anchor - base)
    return float(((policy - policy.mean()) - (closed - closed.mean())).abs().max())


hyperparameters = {
    "alpha": st.floats(0, 8),
    "lam": st.floats(0.05, 8),
    "eta": st.floats(0.01, 1000),
    "iterations": st.integers(0, 150),
    "vocab": st.sampled_from((2, 7, 9, 41, 300)),
    "objectives": st.integers(1, 7),
    "spread": st.floats(0.1, 6),
    "seed": st.integers(0, 2**32),
}


@property_settings
@given(**hyperparameters)
def test_t_vector_steps_of_the_published_loop_equal_one_step_along_the_ray(
    alpha: float,
    lam: float,
    eta: float,
    iterations: int,
    vocab: int,
    objectives: int,
    spread: float,
    seed: int,
) -> None:
    a = strength(alpha, lam, eta, iterations)
    assume(a <= 1000)
    base, anchor = random_branches(seed, vocab, objectives, spread)
    policy = unrolled_loop(base, anchor, alpha, lam, eta, iterations)
    assert max_logprob_error(policy, base, anchor, a) <= 1e-12 * max(1, a)


@property_settings
@given(**hyperparameters)
def test_with_a_fixed_reward_the_loop_equals_its_own_closed_form(
    alpha: float,
    lam: float,
    eta: float,
    iterations: int,
    vocab: int,
    objectives: int,
    spread: float,
    seed: int,
) -> None:
    a = reward_strength(alpha, lam, eta, iterations)
    base, anchor = random_branches(seed, vocab, objectives, spread)
    policy = unrolled_reward_loop(base, anchor, alpha, lam, eta, iterations)
    assert max_logprob_error(policy, base, anchor, a) <= 1e-12 * max(1, a)


@pytest.mark.parametrize(
    ("alpha", "lam", "eta", "iterations", "at_least"),
    [(2, 2, 10, 60, 5.6), (0.5, 1, 10, 80, 1.9), (2, 1, 10, 500, 900), (3, 1, 10, 36, 900)],
)
def test_the_closed_form_holds_up_to_the_maximum_strength(
    alpha: float, lam: float, eta: float, iterations: int, at_least: float
) -> None:
    a = strength(alpha, lam, eta, iterations)
    assert at_least <= a <= 1000
    base, anchor = random_branches(seed=iterations, vocab=4097, objectives=3, spread=4)
    policy = unrolled_loop(base, anchor, alpha, lam, eta, iterations)
    assert max_logprob_error(policy, base, anchor, a) <= 1e-12 * max(1, a)


@property_settings
@given(alpha=st.floats(0, 50), lam=st.floats(0.01, 50), eta=st.floats(0.01, 1e4))
def test_zero_iterations_give_strength_one(alpha: float, lam: float, eta: float) -> None:
    assert strength(alpha, lam, eta, 0) == 1
    assert reward_strength(alpha, lam, eta, 0) == 1


@property_settings
@given(lam=st.floats(0.01, 50), eta=st.floats(0.01, 1e4), iterations=st.integers(1, 300))
def test_without_utility_the_strength_stays_one(lam: float, eta: float, iterations: int) -> None:
    assert strength(0, lam, eta, iterations) == pytest.approx(1, abs=1e-13)


@pytest.mark.parametrize(("alpha", "lam"), [(0.5, 1), (0.2, 1), (1, 3), (3, 4)])
def test_below_lambda_the_strength_approaches_its_fixed_point_at_the_rate_of_the_recurrence(
    alpha: float, lam: float
) -> None:
    """The mean ā of the strengths obeys t ā′ = 1 − (1 − α/λ) ā, so the gap falls as t^−(1 − α/λ)."""
    fixed = lam / (lam - alpha)
    gaps = [fixed - strength(alpha, lam, 10, 10**power) for power in (3, 4, 5)]
    assert gaps[0] > gaps[1] > gaps[2] > 0
    assert math.log10(gaps[1] / gaps[2]) == pytest.approx(1 - alpha / lam, rel=0.02)


def test_at_lambda_the_strength_grows_by_the_logarithm_of_the_iterations() -> None:
    grown = strength(2, 2, 10, 20_000) - strength(2, 2, 10, 2_000)
    assert grown == pytest.approx(math.log(10), rel=1e-3)


def test_above_lambda_the_strength_grows_as_a_power_of_the_iterations() -> None:
    doubled = strength(3, 2, 10, 20_000) / strength(3, 2, 10, 10_000)
    assert doubled == pytest.approx(2 ** (3 / 2 - 1), rel=0.02)


@pytest.mark.parametrize("gain", [0.1, 0.5, 3])
def test_with_a_fixed_reward_the_strength_approaches_one_plus_gain_over_lambda(gain: float) -> None:
    assert reward_strength(gain, 2, 10, 20_000) == pytest.approx(1 + gain / 2, rel=1e-3)
