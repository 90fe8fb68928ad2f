"""Trace: contents per token, and no effect on the tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from trimtab.engine import Base, Engine, Guidance, Mato, Mixture, Objective, Opad, Prompt, Request
from trimtab.kernels.lm_head import AnyLMHead, sample_from_hidden

from ..harness import get_runner
from ..helpers.sample_requests import (
    KIND,
    ODD,
    QUESTION,
    SHORT,
    greedy_params,
    method_id,
    parametrize_methods,
    prompt_ids,
    sampled_params,
)

if TYPE_CHECKING:
    from trimtab.engine import Method
    from trimtab.kernels.steering.layout import RequestLayout
    from trimtab.kernels.steering.step import SamplerOutput


@parametrize_methods
def test_the_trace_has_one_row_per_token_and_one_number_per_branch(method: Method, tiny: Engine) -> None:
    output = tiny.generate(Request(QUESTION, method, sampled_params(4, 25)))
    trace, objectives = output.trace, len(output.branches) - 1
    assert trace is not None
    assert [len(row) for row in trace.weights] == [objectives] * 25
    assert [len(row) for row in trace.rewards] == [objectives] * 25
    assert [len(row) for row in trace.branch_logprobs] == [objectives + 1] * 25
    assert (len(trace.strength), len(trace.kl)) == (25, 25)
    assert trace.weights[0] == pytest.approx(method.weights(), abs=1e-15)
    for row in trace.weights:
        assert all(weight >= 0 for weight in row)
        assert not objectives or sum(row) == pytest.approx(1, abs=1e-12)
        assert all(weight == 0 for weight, prior in zip(row, method.weights(), strict=True) if prior == 0)
    # each branch's log-probabilities are those of its own prompt followed by the answer
    for index, prompt in enumerate(prompt_ids(output)):
        rows = tiny.score(prompt + output.token_ids)[len(prompt) - 1 : -1]
        expected = [float(row[token]) for row, token in zip(rows, output.token_ids, strict=True)]
        assert [row[index] for row in trace.branch_logprobs] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("accumulate", ["sum", "mean", "ema"])
def test_rewards_are_sums_of_the_tokens_log_probability_contrasts(accumulate: str, tiny: Engine) -> None:
    method = Mato([KIND, SHORT, ODD], beta=2.5, tau=4.0, accumulate=accumulate, decay=0.7)
    trace = tiny.generate(Request(QUESTION, method, sampled_params(4, 25))).trace
    assert trace is not None
    total, mean = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    average = torch.zeros(3, dtype=torch.float64)
    prior_weights = torch.tensor(method.weights(), dtype=torch.float64)
    for count, (rewards, weights, logprobs) in enumerate(
        zip(trace.rewards, trace.weights, trace.branch_logprobs, strict=True)
    ):
        expected = {"sum": total, "mean": mean, "ema": average}[accumulate]
        assert rewards == pytest.approx(expected.tolist(), abs=1e-9)
        assert weights == pytest.approx((prior_weights * (-expected / 4.0).exp()).div(
            (prior_weights * (-expected / 4.0).exp()).sum()).tolist(), abs=1e-9)  # fmt: skip
        row = torch.tensor(logprobs, dtype=torch.float64)
        total = total + 2.5 * (row[1:] - row[0]).float().double()
        mean = total / (count + 1)
        average = 0.7 * average + 0.3 * 2.5 * (row[1:] - row[0]).float().double()


@parametrize_methods
def test_tokens_are_the_same_without_a_trace(method: Method, tiny: Engine) -> None:
    for sampling in (greedy_params(25, ignore_eos=True), sampled_params(6, 25, top_p=0.9)):
        request = Request(QUESTION, method, sampling)
        traced, bare = tiny.generate(request), tiny.generate(replace(request, trace=False))
        assert bare.token_ids == traced.token_ids
        assert bare.trace is None
        mixed = tiny.generate([request, replace(request, trace=False)])
        assert [output.token_ids for output in mixed] == [traced.token_ids] * 2


@pytest.mark.parametrize(
    ("method", "rows"),
    [
        (Base(), 1),
        (Prompt([KIND]), 1),
        (Guidance([KIND], guidance_scale=1.0), 1),
        (Guidance([KIND], guidance_scale=0.0), 1),
        (Guidance([KIND]), 2),
        (Guidance([KIND], guidance_scale=1.0, kl_budget=0.1), 2),
        (Opad([KIND]), 2),
        (Mixture([KIND, Objective("Be rude.", 0), SHORT]), 2),
        (Mato([KIND, Objective("Be rude.", 0), SHORT]), 3),
        (Mato([KIND, SHORT], optimise_online=False), 3),
        (Mato([KIND, SHORT], optimise_online=False, optimise_weights=False), 2),
    ],
    ids=method_id,
)
def test_a_branch_of_weight_zero_is_not_run_without_a_trace(
    method: Method, rows: int, tiny: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows_per_step: list[int] = []

    def counted(
        head: AnyLMHead, hidden: torch.Tensor, groups: RequestLayout, *args: Any, **more: Any
    ) -> SamplerOutput:
        rows_per_step.append(len(groups.branch_of_row))
        return sample_from_hidden(head, hidden, groups, *args, **more)

    monkeypatch.setattr(get_runner(tiny), "sample", counted)
    bare = tiny.generate(Request(QUESTION, method, greedy_params(5, ignore_eos=True), trace=False))
    assert rows_per_step == [rows] * 5
    traced = tiny.generate(Request(QUESTION, method, greedy_params(5, ignore_eos=True)))
    assert rows_per_step[5:] == [len(traced.branches)] * 5
    assert bare.token_ids == traced.token_ids
    assert len(bare.branches) == len(traced.branches)
