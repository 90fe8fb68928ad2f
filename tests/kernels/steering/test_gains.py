"""Trim's gains: the literal optimisation in float64, its limits, and the fulfilment that is told."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trimtab.engine.methods.trim import Trim
from trimtab.kernels.steering.gains import MIN_RANGE

from ..steering_harness import (
    GREEDY,
    SAMPLED,
    SteeringCase,
    decode,
    make_objectives,
    random_logits,
    token_ids,
)


def literal_trim(method: Trim, logits: torch.Tensor, tokens: list[int]) -> list[dict[str, list[float]]]:
    """The rule in float64 Python along given tokens: gains before each token, fulfilment after it."""
    intensities = [objective.weight for objective in method.objectives]
    rewards, of_branch, of_base = ([0.0] * len(intensities) for _ in range(3))
    steps = []
    for z, token in zip(logits.double(), tokens, strict=True):
        gains = []
        for i, r, e, p in zip(intensities, rewards, of_branch, of_base, strict=True):
            gain = method.gain * i + method.control_rate * ((1 - i) * p + i * e - r)
            gains.append(min(max(gain, 0.0), method.max_gain) if i else 0.0)
        logprobs = z.log_softmax(-1)
        scores = z[0] + sum(g * (z[k + 1] - z[0]) for k, g in enumerate(gains))
        for k in range(len(intensities)):
            contrast = logprobs[k + 1] - logprobs[0]
            rewards[k] += float(contrast[token])
            of_branch[k] += float((logprobs[k + 1].exp() * contrast).sum())
            of_base[k] += float((logprobs[0].exp() * contrast).sum())
        fulfilment = [
            (r - p) / (e - p) if e - p >= MIN_RANGE else math.nan
            for r, e, p in zip(rewards, of_branch, of_base, strict=True)
        ]
        steps.append({"gains": gains, "fulfilment": fulfilment, "argmax": [float(scores.argmax())]})
    return steps


@pytest.mark.parametrize("weights", [(0.5,), (1.0, 0.25), (0.3, 0.0, 2.0), tuple(0.2 * k for k in range(16))])
def test_the_step_follows_the_literal_rule_in_float64(weights: tuple[float, ...]) -> None:
    method = Trim(make_objectives(*weights), relative_top=None)
    logits = random_logits(3, 40, len(weights) + 1, 50)
    (steps,) = decode(SteeringCase(method, logits))
    expected = literal_trim(method, logits, token_ids(steps))
    assert len({tuple(each["gains"]) for each in expected}) > 20, "the gains change from token to token"
    for got, exact in zip(steps, expected, strict=True):
        gains = [got.strength * weight for weight in got.weights]
        assert gains == pytest.approx(exact["gains"], abs=1e-4)
        assert got.fulfilment == pytest.approx(exact["fulfilment"], abs=1e-4, nan_ok=True)
        assert got.token == exact["argmax"][0]


def test_the_mask_keeps_what_some_branch_with_a_gain_finds_likely() -> None:
    method = Trim(make_objectives(1.0, 0.5), relative_top=0.2)
    logits = random_logits(5, 12, 3, 60)
    for step, z in zip(decode(SteeringCase(method, logits, SAMPLED))[0], logits, strict=True):
        coefs = [1 - step.strength, *(step.strength * weight for weight in step.weights)]
        probs = z.softmax(-1)
        allowed = [probs[b, step.token] >= 0.2 * probs[b].max() - 1e-6 for b in range(3) if coefs[b] > 0]
        assert any(allowed)


def test_all_weights_zero_is_plain_decoding() -> None:
    logits = random_logits(1, 20, 3, 70)
    for sampling in (GREEDY, SAMPLED):
        plain = decode(SteeringCase(Trim(make_objectives(0.0, 0.0)), logits, sampling))[0]
        assert [step.strength for step in plain] == [0.0] * 20
        assert sampling is SAMPLED or token_ids(plain) == logits[:, 0].argmax(-1).tolist()


@settings(deadline=None, max_examples=20)
@given(st.floats(0.05, 1.5), st.integers(0, 5))
def test_the_share_that_was_asked_is_reached_within_the_start_gain(weight: float, seed: int) -> None:
    """On many independent steps R − i E stays bounded, so that R / E comes near i."""
    method = Trim(make_objectives(weight), relative_top=None, control_rate=0.5)
    logits = random_logits(seed, 150, 2, 40, branch_spread=0.5)
    (steps,) = decode(SteeringCase(method, logits, SAMPLED), trace=True)
    assert steps[-1].fulfilment[0] == pytest.approx(weight, abs=0.2)


def test_an_objective_that_leads_is_left_alone_until_it_is_due() -> None:
    method = Trim(make_objectives(0.2), control_rate=5.0, relative_top=None)
    (steps,) = decode(SteeringCase(method, random_logits(2, 60, 2, 40)))
    strengths = [step.strength for step in steps]
    assert strengths[0] == pytest.approx(0.4)
    assert min(strengths) == 0.0 < max(strengths) <= method.max_gain


def test_fulfilment_is_unknown_while_a_branch_hardly_differs() -> None:
    logits = random_logits(0, 30, 2, 50, branch_spread=0.005)
    (steps,) = decode(SteeringCase(Trim(make_objectives(1.0)), logits))
    assert all(math.isnan(step.fulfilment[0]) for step in steps)


@pytest.mark.parametrize("weight", [1e-300, 1e300])
def test_extreme_weights_give_finite_gains(weight: float) -> None:
    (steps,) = decode(SteeringCase(Trim(make_objectives(weight)), random_logits(4, 10, 2, 30)))
    assert all(math.isfinite(step.strength) and not step.failed for step in steps)
    assert [step.strength for step in steps] == [4.0] * 10 if weight > 1 else True
