"""Masks of the vocabulary, against loops over single tokens."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from trimtab.engine.methods.builtin import (
    Amulet,
    Base,
    ContextSteering,
    Guidance,
    Mato,
    Method,
    Mixture,
    Opad,
    Prompt,
)
from trimtab.kernels.common.errors import InputError
from trimtab.kernels.steering.sampling import RowSampling

from ..steering_harness import GREEDY, SteeringCase, decode, make_objectives, random_logits, token_ids

VOCAB = 61
property_settings = settings(deadline=None, derandomize=True, max_examples=40)


def allowed_tokens(logits: Tensor, coefficients: list[float], relative_top: float) -> set[int]:
    """Tokens with p_b(v) ≥ ρ max p_b in a branch b with a coefficient above 0; logits [branches, vocab]."""
    probs = logits.double().softmax(-1)
    allowed = set()
    for branch, coefficient in enumerate(coefficients):
        for token in range(logits.shape[1]):
            if coefficient > 0 and probs[branch, token] >= relative_top * probs[branch].max():
                allowed.add(token)
    return allowed


def branch_coefficients(method: Method) -> list[float]:
    """Of the base branch and of each objective branch in the scores, at the first step."""
    row = method.cached_coefficients
    return [row.base_coef, *(row.objective_coef * weight for weight in method.weights())]


METHODS: list[Any] = [
    lambda rho: Prompt(make_objectives(1.0), relative_top=rho),
    lambda rho: ContextSteering(make_objectives(0.5, 0.0, 0.5), strength=4.0, relative_top=rho),
    lambda rho: ContextSteering(make_objectives(0.5, 0.5), strength=0.4, relative_top=rho),
    lambda rho: ContextSteering(make_objectives(1.0), strength=-3.0, relative_top=rho),
    lambda rho: Guidance(make_objectives(1.0), guidance_scale=6.0, relative_top=rho),
    lambda rho: Mixture(make_objectives(1.0, 3.0), relative_top=rho),
    lambda rho: Mato(make_objectives(1.0, 3.0), alpha=0.9, relative_top=rho),
    lambda rho: Amulet(make_objectives(1.0), relative_top=rho),
]


@property_settings
@given(seed=st.integers(0, 2**40), index=st.integers(0, len(METHODS) - 1), rho=st.floats(0.001, 1))
def test_the_token_is_the_best_of_those_that_relative_top_allows(seed: int, index: int, rho: float) -> None:
    method = METHODS[index](rho)
    coefficients = branch_coefficients(method)
    logits = random_logits(seed, 1, len(coefficients), VOCAB, branch_spread=3)
    every = list(range(len(coefficients)))
    ((result,),) = decode(SteeringCase(method, logits, GREEDY, every))
    scores = (torch.tensor(coefficients)[:, None] * logits[0]).sum(0)
    allowed = sorted(allowed_tokens(logits[0], coefficients, rho))
    assert result.token == allowed[int(scores[allowed].argmax())]


def test_plain_decoding_obeys_relative_top_when_it_draws() -> None:
    logits = random_logits(5, 200, 1, VOCAB)
    case = SteeringCase(Base(relative_top=0.3), logits, _hot(seed=3), [0])
    for step, token in enumerate(token_ids(decode(case)[0])):
        assert token in allowed_tokens(logits[step], [1.0], 0.3)
    free = SteeringCase(Base(), logits, _hot(seed=3), [0])
    outside = [
        t
        for step, t in enumerate(token_ids(decode(free)[0]))
        if t not in allowed_tokens(logits[step], [1.0], 0.3)
    ]
    assert len(outside) > 20


def test_the_trust_region_is_measured_among_the_allowed_tokens() -> None:
    budget, rho = 0.2, 0.1
    logits = random_logits(8, 60, 3, VOCAB, branch_spread=2)
    method = Mato(
        make_objectives(0.4, 0.6), alpha=0.9, kl_budget=budget, relative_top=rho, optimise_weights=False
    )
    exhausted = 0
    for step, result in enumerate(decode(SteeringCase(method, logits))[0]):
        z = logits[step].double()
        merged = 0.4 * z[1] + 0.6 * z[2]
        steered = z[0] + result.strength * (merged - z[0])
        allowed = sorted(allowed_tokens(logits[step], branch_coefficients(method), rho))
        log_steered, log_merged = steered[allowed].log_softmax(-1), merged[allowed].log_softmax(-1)
        kl = float((log_steered.exp() * (log_steered - log_merged)).sum())
        assert kl <= budget * 1.0001
        assert result.kl == pytest.approx(kl, abs=1e-4)
        exhausted += kl > budget * 0.99
        assert result.token == allowed[int(steered[allowed].argmax())]
    assert exhausted > 5


def test_a_tiny_weight_counts_as_long_as_float32_holds_its_coefficient() -> None:
    logits = torch.zeros(1, 3, 4)
    logits[0, 1, 1], logits[0, 2, 2] = 9.0, 9.0
    for weight, expected in ((1e-30, {1, 2}), (1e-300, {2})):
        method = Mixture(make_objectives(weight, 1.0), relative_top=0.9)
        tokens = {
            token_ids(decode(SteeringCase(method, logits, _hot(seed=seed, temperature=1e6), [0, 1, 2]))[0])[0]
            for seed in range(40)
        }
        assert tokens == expected


def test_opad_starts_with_the_objective_branch_alone() -> None:
    logits = random_logits(2, 1, 2, VOCAB, branch_spread=3)
    ((result,),) = decode(SteeringCase(Opad(make_objectives(1.0), relative_top=1.0), logits))
    assert result.token == int(logits[0, 1].argmax())


@pytest.mark.parametrize("value", [0.0, -0.1, 1.1, math.nan, math.inf])
def test_a_relative_top_out_of_range_is_refused(value: float) -> None:
    with pytest.raises(InputError, match=r"relative_top of .* is .*; it must be above 0 and at most 1"):
        ContextSteering(make_objectives(1.0), relative_top=value)


def _hot(seed: int, temperature: float = 2.0) -> RowSampling:
    return RowSampling(temperature=temperature, seed=seed)
