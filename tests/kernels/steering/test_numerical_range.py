"""Extreme logits and settings: a request that does not fail has no NaN in its outputs."""

from __future__ import annotations

import math
from itertools import product
from typing import TYPE_CHECKING

import pytest
import torch
from torch import Tensor
from trimtab.engine.methods.builtin import (
    Amulet,
    Base,
    ContextSteering,
    Guidance,
    LinearAlignment,
    Mato,
    Method,
    Mixture,
    Opad,
    Prompt,
)
from trimtab.kernels.steering.layout import RequestLayout
from trimtab.kernels.steering.rewards import reweight
from trimtab.kernels.steering.sampling import RowSampling
from trimtab.kernels.steering.state import SteeringState
from trimtab.kernels.steering.step import SamplerOutput, steer

from ..steering_harness import make_objectives

if TYPE_CHECKING:
    from collections.abc import Sequence

VOCAB = 41
SCALES = (0.0, 1e-45, 1e-30, 1.0, 1e10, 1e18, 1e20, 1e30, 1e32)
"""At larger scales the sum of a row of logits, or a times a difference, may overflow float32."""
DRAWS = (
    RowSampling(),
    RowSampling(temperature=1e-30),
    RowSampling(temperature=1e-5),
    RowSampling(temperature=1000.0),
    RowSampling(temperature=1.0, top_p=1e-12),
    RowSampling(temperature=1.0, top_p=1 - 1e-16),
    RowSampling(temperature=1.0, min_p=5e-324),
    RowSampling(temperature=1.0, min_p=1.0, top_k=2, top_p=0.3),
)


METHODS = (
    Base(),
    Prompt(make_objectives(1.0)),
    LinearAlignment(make_objectives(1.0), mask_temperature=1e-6),
    LinearAlignment(make_objectives(1.0), mask_top_p=1e-12, mask_temperature=1e6),
    ContextSteering(make_objectives(1.0, 2.0), strength=1000.0),
    ContextSteering(make_objectives(1.0, 2.0), strength=1000.0, kl_budget=1e-12),
    Guidance(make_objectives(1.0), guidance_scale=-1000.0),
    Guidance(make_objectives(1.0), kl_budget=1e300),
    Opad(make_objectives(1.0), gain=999.0),
    Amulet(make_objectives(1.0)),
    Mato(make_objectives(1e300, 1e-300)),
    Mato(make_objectives(5e-324, 1e-300, 0.0)),
    Mato(make_objectives(1.0, 2.0, 0.0), tau=1e-300),
    Mato(make_objectives(*range(1, 16)), beta=1e8, tau=1e-300, kl_budget=0.2),
    Mato(make_objectives(1.0, 2.0), beta=1e300, tau=1e300, accumulate="ema", decay=0.0),
    Mixture(make_objectives(1e-300, 1.0)),
)
ON_A_RAY = (ContextSteering, Guidance, Amulet, Mato)


def run_steps(method: Method, scales: Sequence[float], kind: str = "drawn") -> list[SamplerOutput]:
    """Three steps of a batch with every combination of logit scale and sampling settings."""
    state, branches = SteeringState(VOCAB), len(method.branch_objectives()) + 1
    cases = list(product(scales, DRAWS))
    for row, (_, sampling) in enumerate(cases):
        state.add_request(row, method.cached_coefficients, method.weights(), sampling)
    layout = RequestLayout.from_branches([(row, range(branches)) for row in range(len(cases))])
    unscaled = (torch.cat([make_logits(branches, kind, step)] * len(cases)) for step in range(3))
    factors = torch.tensor([scale for scale, _ in cases]).repeat_interleave(branches)[:, None]
    return [steer(factors * row, layout, state, top=True) for row in unscaled]


def make_logits(branches: int, kind: str, step: int) -> Tensor:
    """Logits from −1 to 1, [branches, vocab]."""
    if kind == "level":
        return torch.linspace(-1, 1, branches)[:, None].repeat(1, VOCAB)
    if kind == "one token":
        return torch.eye(VOCAB)[step : step + branches]
    return torch.randn(branches, VOCAB, generator=torch.Generator().manual_seed(step)).clamp(-1, 1)


def nan_groups(choice: SamplerOutput) -> Tensor:
    """Which requests have a NaN in their outputs, [requests]; kl is exempt."""
    assert choice.top_logprobs is not None
    reported = [
        choice.logprob,
        choice.strength,
        *choice.rewards.T,
        *choice.weights.T,
        *choice.top_logprobs[0].T,
    ]
    reported += list(choice.branch_logprobs.unflatten(0, (len(choice.tokens), -1)).T)
    return torch.stack([part.isnan() for part in reported]).any(0)


@pytest.mark.parametrize("kind", ["drawn", "level", "one token"])
@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_finite_logits_of_any_size_give_finite_results(method: Method, kind: str) -> None:
    for choice in run_steps(method, SCALES, kind):
        assert not choice.failed.any()
        assert not nan_groups(choice).any()
        assert not (isinstance(method, ON_A_RAY) and choice.kl.isnan().any())
        assert bool((choice.weights >= 0).all())
        if method.objectives:
            assert choice.weights.sum(-1).tolist() == pytest.approx([1] * len(choice.tokens), abs=1e-12)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_logits_near_the_float32_limit_fail_or_give_finite_results(method: Method) -> None:
    for choice in run_steps(method, (1e36, 1e37, 3e38)):
        assert not (nan_groups(choice) & ~choice.failed).any()
        assert bool(choice.weights.isfinite().all())


def test_at_any_tau_the_lowest_reward_gets_the_largest_weight_and_ties_keep_prior_weights() -> None:
    double = {"dtype": torch.float64}
    prior = torch.tensor([[0.2, 0.3, 0.5, 0.0]] * 3, **double)
    rewards = torch.tensor(
        [[2.0, 2.0, 2.5, -9.0], [-7e9, -7e9, 3e9, -8e9], [1e300, 1e300, -1e300, 0]], **double
    )
    weights = reweight(prior, rewards, torch.tensor([1e308, 1e300, 1e-300], **double))
    assert weights[:2].tolist() == [pytest.approx([0.4, 0.6, 0, 0], abs=1e-15)] * 2
    behind = 0.5 * math.exp(-2)
    total = behind + 0.5
    assert weights[2].tolist() == pytest.approx(
        [0.2 * math.exp(-2) / total, 0.3 * math.exp(-2) / total, 0.5 / total, 0]
    )
