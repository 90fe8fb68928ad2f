"""The steering step: every method against its formulas, and requests in a batch against alone."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from trimtab.engine.methods.builtin import (
    Amulet,
    ContextSteering,
    Guidance,
    LinearAlignment,
    Mato,
    Method,
    Mixture,
    Opad,
    Prompt,
)
from trimtab.kernels.steering.closed_form import unrolled_loop
from trimtab.kernels.steering.coefficients import SteeringCoefficients
from trimtab.kernels.steering.layout import RequestLayout
from trimtab.kernels.steering.sampling import RowSampling
from trimtab.kernels.steering.state import SteeringState
from trimtab.kernels.steering.step import steer

from ..steering_harness import (
    GREEDY,
    SAMPLED,
    SteeringCase,
    all_method_cases,
    bitwise_equal,
    decode,
    float64_tensor,
    make_objectives,
    nucleus_by_sorting,
    plain_decode,
    random_logits,
    token_ids,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

property_settings = settings(deadline=None, derandomize=True, max_examples=15)
seeds = st.integers(0, 2**40)


# Coefficients.


@property_settings
@given(seed=seeds, objectives=st.integers(1, 5), data=st.data(), draw=st.sampled_from((GREEDY, SAMPLED)))
def test_one_hot_coefficients_give_plain_decoding_of_that_branch(
    seed: int, objectives: int, data: st.DataObject, draw: RowSampling
) -> None:
    chosen = data.draw(st.integers(1, objectives))
    logits = random_logits(seed, 5, objectives + 1, 41)
    weights = [float(index == chosen) for index in range(1, objectives + 1)]
    every = list(range(objectives + 1))
    on_base = SteeringCase(ContextSteering(make_objectives(*weights), strength=0.0), logits, draw, every)
    on_objective = SteeringCase(Mixture(make_objectives(*weights)), logits, draw, every)
    assert token_ids(decode(on_base)[0]) == plain_decode(logits[:, 0], draw)
    assert token_ids(decode(on_objective)[0]) == plain_decode(logits[:, chosen], draw)


def test_greedy_plain_decoding_takes_the_largest_logit() -> None:
    logits = random_logits(seed=1, num_steps=50, num_branches=1, vocab=97)
    assert plain_decode(logits[:, 0], GREEDY) == logits[:, 0].argmax(-1).tolist()


def all_methods(*weights: float, kl_budget: float | None = None) -> list[Method]:
    """One of each method; methods for a single objective get one of weight 1."""
    one, many = make_objectives(1.0), make_objectives(*weights)
    budget: dict[str, Any] = {"kl_budget": kl_budget}
    return [
        Prompt(one),
        LinearAlignment(one, mask_top_p=None, **budget),
        ContextSteering(many, **budget),
        Guidance(one, **budget),
        Opad(one),
        Amulet(one, **budget),
        Mato(many, **budget),
        Mato(many, accumulate="mean", utility="reward", **budget),
        Mato(many, optimise_weights=False, optimise_online=False, **budget),
        Mixture(many),
    ]


@pytest.mark.parametrize("kl_budget", [None, 0.2])
@pytest.mark.parametrize("draw", [GREEDY, SAMPLED])
@pytest.mark.parametrize("index", range(10))
def test_identical_branches_give_plain_decoding_whatever_the_weights(
    index: int, draw: RowSampling, kl_budget: float | None
) -> None:
    method = all_methods(0.7, 0.0, 2.5, kl_budget=kl_budget)[index]
    alone = random_logits(index, 12, 1, 97)
    logits = alone.expand(-1, len(method.weights()) + method.coefficients().needs_base, -1)
    assert token_ids(decode(SteeringCase(method, logits, draw))[0]) == plain_decode(alone[:, 0], draw)


def test_identical_branches_give_plain_greedy_decoding_inside_a_support_mask() -> None:
    alone = random_logits(3, 12, 1, 97)
    request = SteeringCase(LinearAlignment(make_objectives(1.0)), alone.expand(-1, 2, -1))
    assert token_ids(decode(request)[0]) == plain_decode(alone[:, 0], GREEDY)


@property_settings
@given(
    seed=seeds,
    order=st.permutations(range(4)),
    weights=st.lists(st.floats(0.01, 1), min_size=4, max_size=4),
    kind=st.sampled_from((Mato, ContextSteering, Mixture)),
    kl_budget=st.sampled_from((None, 0.1)),
)
def test_permuting_objectives_with_their_weights_changes_nothing(
    seed: int, order: list[int], weights: list[float], kind: type[Method], kl_budget: float | None
) -> None:
    budget: dict[str, Any] = {} if kind is Mixture else {"kl_budget": kl_budget}
    logits = random_logits(seed, 6, 5, 41)
    shuffled = logits[:, [0, *(1 + index for index in order)]]
    every = list(range(5))
    (ours,) = decode(SteeringCase(kind(make_objectives(*weights), **budget), logits, GREEDY, every))
    moved = kind(make_objectives(*(weights[index] for index in order)), **budget)
    (theirs,) = decode(SteeringCase(moved, shuffled, GREEDY, every))
    assert token_ids(ours) == token_ids(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert other.weights == pytest.approx([one.weights[index] for index in order], rel=1e-12)
        assert other.rewards == pytest.approx([one.rewards[index] for index in order], rel=1e-12)
        tight = kl_budget is None
        assert other.strength == pytest.approx(one.strength, rel=1e-12 if tight else 2e-3)


@property_settings
@given(
    seed=seeds,
    alpha=st.floats(0, 2),
    iterations=st.integers(0, 80),
    kl_budget=st.sampled_from((None, 0.05)),
    draw=st.sampled_from((GREEDY, SAMPLED)),
)
def test_mato_with_one_objective_is_amulet(
    seed: int, alpha: float, iterations: int, kl_budget: float | None, draw: RowSampling
) -> None:
    logits = random_logits(seed, 6, 2, 41)
    shared: dict[str, Any] = {"alpha": alpha, "lam": 2.0, "iterations": iterations, "kl_budget": kl_budget}
    mato, amulet = (
        Mato(make_objectives(0.3), nu=10.0, tau=0.1, **shared),
        Amulet(make_objectives(0.3), eta=10.0, **shared),
    )
    (ours,), (theirs,) = (decode(SteeringCase(method, logits, draw, [0, 1])) for method in (mato, amulet))
    assert bitwise_equal(ours, theirs)


# Trajectories against the papers' formulas.


class ReferenceStep(NamedTuple):
    token: int
    logprob: float
    weights: list[float]
    rewards: list[float]


def mato_reference(
    method: Mato, logits: Tensor, dtype: torch.dtype, forced: Sequence[int]
) -> list[ReferenceStep]:
    """MATO with the literal loop over the vocabulary, continuing with the tokens `forced`."""
    prior = float64_tensor([*method.weights()])
    rewards, steps = torch.zeros_like(prior), []
    for t, z in enumerate(logits):
        logprobs = z.to(dtype).log_softmax(-1).double()
        weights = prior * torch.exp(-rewards / method.tau)
        weights = weights / weights.sum()
        merged = weights @ logprobs[1:]
        policy = unrolled_loop(logprobs[0], merged, method.alpha, method.lam, method.nu, method.iterations)
        policy, token = policy.log_softmax(-1), int(policy.argmax())
        steps.append(ReferenceStep(token, float(policy[token]), weights.tolist(), rewards.tolist()))
        gained = method.beta * (logprobs[1:, forced[t]] - logprobs[0, forced[t]])
        rewards = {
            "sum": rewards + gained,
            "mean": (rewards * t + gained) / (t + 1),
            "ema": method.decay * rewards + (1 - method.decay) * gained,
        }[method.accumulate]
    return steps


def is_within_error(got: Sequence[float], truth: Sequence[float], rough: Sequence[float]) -> bool:
    """Whether the error of `got` against float64 is at most twice that of float32, plus 1e-5."""
    allowed = 2 * (float64_tensor([*rough]) - float64_tensor([*truth])).abs().max() + 1e-5
    return bool(((float64_tensor([*got]) - float64_tensor([*truth])).abs() <= allowed).all())


@property_settings
@given(
    seed=seeds,
    accumulate=st.sampled_from(("sum", "mean", "ema")),
    weights=st.lists(st.floats(0.05, 1) | st.just(0.0), min_size=1, max_size=5).filter(any),
    tau=st.floats(0.3, 10),
    beta=st.floats(0.1, 3),
    decay=st.floats(0, 0.99),
    vocab=st.sampled_from((7, 9, 41, 333)),
    iterations=st.sampled_from((0, 3, 80)),
)
def test_mato_follows_its_formulas_token_by_token(
    seed: int,
    accumulate: str,
    weights: list[float],
    tau: float,
    beta: float,
    decay: float,
    vocab: int,
    iterations: int,
) -> None:
    how: dict[str, Any] = {"tau": tau, "beta": beta, "decay": decay, "iterations": iterations}
    method = Mato(make_objectives(*weights), accumulate=accumulate, **how)
    logits = random_logits(seed, 9, len(weights) + 1, vocab)
    (step_results,) = decode(SteeringCase(method, logits))
    truth = mato_reference(method, logits, torch.float64, token_ids(step_results))
    rough = mato_reference(method, logits, torch.float32, token_ids(step_results))
    assert token_ids(step_results) == [step.token for step in truth]
    for got, exact, single in zip(step_results, truth, rough, strict=True):
        assert is_within_error(got.weights, exact.weights, single.weights)
        assert is_within_error(got.rewards, exact.rewards, single.rewards)
        assert got.logprob == pytest.approx(exact.logprob, abs=2 * abs(single.logprob - exact.logprob) + 3e-5)
        assert [w == 0 for w in got.weights] == [w == 0 for w in weights]


@property_settings
@given(seed=seeds, gain=st.sampled_from((0.5, 1.0, 3.0)), vocab=st.sampled_from((7, 41, 333)))
def test_opad_starts_at_the_objective_and_then_adds_the_previous_steps_contrast(
    seed: int, gain: float, vocab: int
) -> None:
    logits = random_logits(seed, 10, 2, vocab, branch_spread=0.7)
    (step_results,) = decode(SteeringCase(Opad(make_objectives(1.0), gain=gain), logits))
    base, objective = logits.double().unbind(1)
    scores = [objective[0]] + [
        (1 + gain) * objective[t] - gain * base[t] + gain * (objective[t - 1] - base[t - 1])
        for t in range(1, 10)
    ]
    assert token_ids(step_results) == [int(row.argmax()) for row in scores]
    exact = [
        float(row.log_softmax(-1)[token]) for row, token in zip(scores, token_ids(step_results), strict=True)
    ]
    assert [step.logprob for step in step_results] == pytest.approx(exact, abs=3e-5 * (1 + gain))


def test_a_new_request_in_a_reused_row_starts_from_scratch() -> None:
    table = SteeringState(41)
    for method in (Opad(make_objectives(1.0)), Mato(make_objectives(0.4, 0.6))):
        logits = random_logits(5, 8, len(method.weights()) + 1, 41)
        first = decode(SteeringCase(method, logits, SAMPLED), state=table)
        assert bitwise_equal(decode(SteeringCase(method, logits, SAMPLED), state=table), first)


@property_settings
@given(seed=seeds, top_p=st.floats(0.05, 0.999), temperature=st.floats(0.3, 3))
def test_linear_alignment_takes_the_best_token_of_the_objectives_nucleus(
    seed: int, top_p: float, temperature: float
) -> None:
    method = LinearAlignment(make_objectives(1.0), mask_top_p=top_p, mask_temperature=temperature)
    logits = random_logits(seed, 8, 2, 97, branch_spread=2)
    (step_results,) = decode(SteeringCase(method, logits))
    base, objective = logits.double().unbind(1)
    for t, token in enumerate(token_ids(step_results)):
        allowed = nucleus_by_sorting(objective[t] / temperature, top_p)
        scores = 3 * objective[t] - 2 * base[t]
        assert token == max(allowed, key=lambda v: float(scores[v]))


# Reported outputs.


@property_settings
@given(
    seed=seeds,
    objectives=st.integers(1, 5),
    strength=st.floats(-5, 1000),
    vocab=st.sampled_from((7, 41, 1000)),
    temperature=st.sampled_from((0.0, 0.7)),
)
def test_the_reported_logprob_is_of_the_steered_scores_before_temperature_and_truncation(
    seed: int, objectives: int, strength: float, vocab: int, temperature: float
) -> None:
    weights = [0.5 + index for index in range(objectives)]
    method = ContextSteering(make_objectives(*weights), strength=strength)
    logits = random_logits(seed, 3, objectives + 1, vocab, branch_spread=0.2)
    (step_results,) = decode(SteeringCase(method, logits, RowSampling(temperature, top_k=5, seed=seed)))
    coefficients = torch.tensor([1 - strength, *(strength * w for w in method.weights())])
    for z, step in zip(logits, step_results, strict=True):
        exact = (coefficients.double()[:, None] * z.double()).sum(0).log_softmax(-1)
        rough = (coefficients.float()[:, None] * z).sum(0).log_softmax(-1)
        # the coefficients themselves are rounded to float32, here and in the kernel
        rounding = 2**-23 * float((coefficients.double()[:, None] * z.double()).abs().sum(0).max())
        allowed = 2 * float((rough - exact).abs().max()) + 2 * rounding + 1e-5
        assert abs(step.logprob - float(exact[step.token])) <= allowed
        count = min(20, vocab)
        assert [token for token, _ in step.top] == [
            token for token, _ in sorted(step.top, key=lambda entry: -entry[1])
        ]
        for (_, value), best in zip(step.top, exact.topk(count).values.tolist(), strict=True):
            assert abs(value - best) <= allowed
        for token, value in step.top:
            assert abs(value - float(exact[token])) <= allowed


@property_settings
@given(seed=seeds, vocab=st.sampled_from((7, 41, 1000)))
def test_branch_logprobs_are_those_of_the_chosen_token_in_each_branch(seed: int, vocab: int) -> None:
    logits = random_logits(seed, 4, 4, vocab)
    (step_results,) = decode(SteeringCase(Mato(make_objectives(1.0, 2.0, 3.0)), logits))
    for z, step in zip(logits, step_results, strict=True):
        exact, rough = z.double().log_softmax(-1), z.log_softmax(-1)
        at = [rows[:, step.token].tolist() for rows in (exact, rough)]
        assert is_within_error(step.branches, at[0], at[1])


def kl_reference(base: Tensor, merged: Tensor, a: float) -> float:
    near, far = merged.log_softmax(-1), (base + a * (merged - base)).log_softmax(-1)
    return float((far.exp() * (far - near)).sum())


@pytest.mark.parametrize("kl_budget", [None, 0.05])
def test_the_reported_kl_is_from_the_merged_policy(kl_budget: float | None) -> None:
    logits = random_logits(8, 20, 3, 333)
    (step_results,) = decode(SteeringCase(Amulet(make_objectives(1.0), kl_budget=kl_budget), logits[:, :2]))
    base, objective = logits[:, :2].double().unbind(1)
    for t, step in enumerate(step_results):
        assert step.kl == pytest.approx(kl_reference(base[t], objective[t], step.strength), abs=1e-4)
    assert any(step.strength < 5 for step in step_results) == (kl_budget is not None)


def test_kl_is_nan_for_methods_not_of_the_form_b_plus_a_m_minus_b() -> None:
    logits = random_logits(8, 4, 3, 41)
    step_results = decode(
        SteeringCase(Opad(make_objectives(1.0)), logits[:, :2]),
        SteeringCase(Mixture(make_objectives(1.0, 1.0)), logits[:, 1:]),
    )
    assert all(math.isnan(step.kl) for steps in step_results for step in steps)


@pytest.mark.parametrize("draw", [GREEDY, SAMPLED])
def test_a_huge_kl_budget_changes_no_token(draw: RowSampling) -> None:
    logits = random_logits(2, 20, 3, 333)
    free, bound = (Mato(make_objectives(0.2, 0.8), kl_budget=budget) for budget in (None, 1e30))
    (ours,), (theirs,) = (decode(SteeringCase(method, logits, draw)) for method in (free, bound))
    assert token_ids(ours) == token_ids(theirs)
    assert [step.strength for step in ours] == [step.strength for step in theirs]


@pytest.mark.parametrize("index", range(10))
def test_tokens_and_weights_are_the_same_without_a_trace(index: int) -> None:
    method = all_methods(0.7, 0.0, 2.5, kl_budget=0.1)[index]
    logits = random_logits(index, 8, len(method.weights()) + method.coefficients().needs_base, 97)
    traced, silent = (
        decode(SteeringCase(method, logits, SAMPLED), trace=on, top_k=on) for on in (True, False)
    )
    assert token_ids(traced[0]) == token_ids(silent[0])
    assert [step.weights for step in traced[0]] == [step.weights for step in silent[0]]
    assert [step.strength for step in traced[0]] == [step.strength for step in silent[0]]


# Batching.


def test_a_request_gives_the_same_bits_in_a_mixed_batch_as_alone() -> None:
    requests = all_method_cases()
    starts = [index % 4 for index in range(len(requests))]
    together = decode(*requests, start_steps=starts)
    for request, step_results in zip(requests, together, strict=True):
        assert bitwise_equal(step_results, decode(request)[0]), request.method.name


def test_a_request_gives_the_same_bits_when_the_batch_is_computed_by_two_threads() -> None:
    """Threads split a batch at other indices than a single request."""
    requests = [
        SteeringCase(method, random_logits(seed, 2, 3, 20_011), SAMPLED)
        for seed, method in enumerate(
            (Mato(make_objectives(1.0, 3.0)), Mato(make_objectives(2.0, 3.0), kl_budget=0.1))
        )
    ]
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        together = decode(*requests)
        alone = [decode(request)[0] for request in requests]
    finally:
        torch.set_num_threads(threads)
    assert bitwise_equal(together, alone)


def test_an_integer_parameter_of_one_request_does_not_round_those_of_another() -> None:
    logits = random_logits(4, 3, 2, 41)
    integer_case = SteeringCase(
        ContextSteering(make_objectives(1.0), strength=2), logits, RowSampling(temperature=1, seed=1)
    )
    fraction = SteeringCase(
        Guidance(make_objectives(1.0), guidance_scale=1.5), logits, RowSampling(temperature=0.5, seed=1)
    )
    together = decode(integer_case, fraction)
    assert bitwise_equal(together, [decode(integer_case)[0], decode(fraction)[0]])
    assert together[1][0].strength == 1.5


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("odd", [0, 1])
def test_a_non_finite_row_fails_only_its_request(odd: int, value: float) -> None:
    requests = [replace(request, logits=request.logits[:4].clone()) for request in all_method_cases()]
    healthy = decode(*requests, top_k=False)
    for index, request in enumerate(requests):
        if index % 2 == odd:
            row = index % request.logits.shape[1]
            request.logits[2, row, slice(None) if index % 3 else 50 * index % request.logits.shape[2]] = value
    broken = decode(*requests, top_k=False)
    for index, (ill, well) in enumerate(zip(broken, healthy, strict=True)):
        if index % 2 == odd:
            assert [step.failed for step in ill[:3]] == [False, False, True]
            assert ill[2].token == 0
            assert all(map(math.isfinite, ill[3].weights))
        else:
            assert bitwise_equal(ill, well)


# Allowed tokens.


@pytest.mark.parametrize("draw", [GREEDY, SAMPLED, RowSampling(temperature=50.0, seed=2)])
@pytest.mark.parametrize("index", range(11))
def test_ids_beyond_the_vocabulary_are_never_sampled(index: int, draw: RowSampling) -> None:
    method = [*all_methods(0.7, 0.0, 2.5), LinearAlignment(make_objectives(1.0))][index]
    logits = random_logits(index, 30, len(method.weights()) + method.coefficients().needs_base, 48)
    logits[:, :, 41:] += 30
    (step_results,) = decode(SteeringCase(method, logits, draw), vocab=41, top_k=False)
    assert not any(step.failed for step in step_results)
    assert max(token_ids(step_results)) < 41


def test_default_coefficients_give_plain_decoding() -> None:
    table = SteeringState(7)
    table.add_request(0, SteeringCoefficients(), (), GREEDY)
    logits = random_logits(0, 1, 1, 7)[0]
    choice = steer(logits, RequestLayout.from_branches([(0, [0])]), table)
    assert choice.tokens.tolist() == logits.argmax(-1).tolist()
    assert table.steps.tolist() == [1]
