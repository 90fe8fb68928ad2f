"""Objective weights: on the simplex, minimising rewards plus divergence from the prior weights."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from trimtab.engine.methods.builtin import Mato
from trimtab.kernels.steering.rewards import reweight

from ..steering_harness import SteeringCase, decode, float64_tensor, make_objectives, random_logits

property_settings = settings(deadline=None, derandomize=True, max_examples=15)


@property_settings
@given(
    prior_weights=st.lists(
        st.sampled_from((0.0, 5e-324, 1e-300, 1e-9, 0.1, 0.5, 1.0)), min_size=1, max_size=7
    ).filter(any),
    data=st.data(),
    rate=st.sampled_from((1e-300, 1e-3, 1.0, 1e3, 1e290)),
)
def test_weights_stay_on_the_simplex_and_a_weight_of_zero_stays_zero(
    prior_weights: list[float], data: st.DataObject, rate: float
) -> None:
    reward = st.floats(-1e6, 1e6) | st.sampled_from((-1e6, 0.0, 1e6))
    rewards = data.draw(st.lists(reward, min_size=len(prior_weights), max_size=len(prior_weights)))
    expected = float64_tensor([[weight / max(prior_weights) for weight in prior_weights]])
    expected /= expected.sum()
    got = reweight(expected, float64_tensor([rewards]), float64_tensor([rate]))
    assert bool(got.isfinite().all())
    assert bool((got >= 0).all())
    assert float(got.sum()) == pytest.approx(1, abs=1e-12)
    assert not got[expected == 0].any()


def test_weights_of_huge_rewards_at_a_tiny_temperature_still_sum_to_one() -> None:
    prior, rewards = float64_tensor([[0.3, 0.3, 0.4]]), float64_tensor([[1e6, 2e6, 3e6]])
    assert reweight(prior, rewards, float64_tensor([1e300])).tolist() == [[1, 0, 0]]


@property_settings
@given(
    prior_weights=st.lists(st.floats(0.01, 1), min_size=2, max_size=6),
    data=st.data(),
    tau=st.floats(0.05, 20),
    seed=st.integers(0, 2**40),
)
def test_weights_minimise_reward_plus_divergence_from_the_prior_weights(
    prior_weights: list[float], data: st.DataObject, tau: float, seed: int
) -> None:
    expected = float64_tensor(prior_weights) / sum(prior_weights)
    count = len(prior_weights)
    rewards = float64_tensor(data.draw(st.lists(st.floats(-30, 30), min_size=count, max_size=count)))
    best = reweight(expected[None], rewards[None], float64_tensor([1 / tau]))[0]

    def cost(weights: Tensor) -> Tensor:
        return (weights * rewards).sum(-1) + tau * torch.special.xlogy(weights, weights / expected).sum(-1)

    generator = torch.Generator().manual_seed(seed)
    others = torch.rand(200, count, generator=generator, dtype=torch.float64)
    near = best + 0.01 * torch.rand(200, count, generator=generator, dtype=torch.float64)
    tried = torch.cat((others, near))
    slack = 1e-12 * (1 + float(rewards.abs().max()) + tau)
    assert bool((cost(tried / tried.sum(-1, keepdim=True)) >= cost(best) - slack).all())


def test_weights_do_not_depend_on_how_many_objectives_other_requests_have() -> None:
    generator = torch.Generator().manual_seed(0)
    prior_weights = torch.rand(200, 7, generator=generator, dtype=torch.float64)
    rewards = 4 * torch.randn(200, 7, generator=generator, dtype=torch.float64)
    rate = torch.ones(200, dtype=torch.float64)
    wide = [torch.nn.functional.pad(x, (0, 57)) for x in (prior_weights, rewards)]
    assert torch.equal(reweight(*wide, rate)[:, :7], reweight(prior_weights, rewards, rate))


@pytest.mark.parametrize("accumulate", ["sum", "mean", "ema"])
def test_weights_stay_finite_when_rewards_are_huge(accumulate: str) -> None:
    """Every token changes one reward by about +1e6 and another by −1e6."""
    logits = random_logits(0, 20, 4, 9)
    logits[:, 0, 3] += 30
    logits[:, 1], logits[:, 2] = logits[:, 1], logits[:, 2] * 1e6
    logits[:, 3] = -logits[:, 2]
    (steps,) = decode(SteeringCase(Mato(make_objectives(0.5, 0.5, 1e-300), accumulate=accumulate), logits))
    assert max(abs(reward) for step in steps for reward in step.rewards) > 1e6
    for step in steps:
        assert not step.failed
        assert all(map(math.isfinite, [*step.weights, *step.rewards]))
        assert sum(step.weights) == pytest.approx(1, abs=1e-12)
