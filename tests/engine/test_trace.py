"""The trace says how each token was chosen, and asking for none changes no token."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from trimtab.engine import Base, Engine, Guidance, Mato, Mixture, Objective, Opad, Prompt, Request
from trimtab.kernels.lm_head import AnyHead, choose

from ..helpers.sample_requests import (
    ASK,
    KIND,
    ODD,
    SHORT,
    described,
    each_method,
    greedy,
    prompt_ids,
    sampled,
)

if TYPE_CHECKING:
    from trimtab.engine import Method
    from trimtab.kernels.steering.state import Groups
    from trimtab.kernels.steering.step import Choice


@each_method
def test_the_trace_has_one_row_a_token_and_one_number_a_branch(method: Method, tiny: Engine) -> None:
    output = tiny.generate(Request(ASK, method, sampled(4, 25)))
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
        assert all(weight == 0 for weight, asked in zip(row, method.weights(), strict=True) if asked == 0)
    # each branch's log-probabilities are those of its own prompt followed by the answer
    for index, prompt in enumerate(prompt_ids(output)):
        rows = tiny.score(prompt + output.token_ids)[len(prompt) - 1 : -1]
        expected = [float(row[token]) for row, token in zip(rows, output.token_ids, strict=True)]
        assert [row[index] for row in trace.branch_logprobs] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("accumulate", ["sum", "mean", "ema"])
def test_rewards_are_what_the_log_probabilities_of_the_tokens_so_far_add_up_to(
    accumulate: str, tiny: Engine
) -> None:
    method = Mato([KIND, SHORT, ODD], beta=2.5, tau=4.0, accumulate=accumulate, decay=0.7)
    trace = tiny.generate(Request(ASK, method, sampled(4, 25))).trace
    assert trace is not None
    total, mean = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    average = torch.zeros(3, dtype=torch.float64)
    asked = torch.tensor(method.weights(), dtype=torch.float64)
    for count, (rewards, weights, logprobs) in enumerate(
        zip(trace.rewards, trace.weights, trace.branch_logprobs, strict=True)
    ):
        expected = {"sum": total, "mean": mean, "ema": average}[accumulate]
        assert rewards == pytest.approx(expected.tolist(), abs=1e-9)
        assert weights == pytest.approx((asked * (-expected / 4.0).exp()).div(
            (asked * (-expected / 4.0).exp()).sum()).tolist(), abs=1e-9)  # fmt: skip
        row = torch.tensor(logprobs, dtype=torch.float64)
        total = total + 2.5 * (row[1:] - row[0]).float().double()
        mean = total / (count + 1)
        average = 0.7 * average + 0.3 * 2.5 * (row[1:] - row[0]).float().double()


@each_method
def test_tokens_are_the_same_without_a_trace(method: Method, tiny: Engine) -> None:
    for sampling in (greedy(25, ignore_eos=True), sampled(6, 25, top_p=0.9)):
        request = Request(ASK, method, sampling)
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
    ids=described,
)
def test_a_branch_that_cannot_matter_is_not_run_without_a_trace(
    method: Method, rows: int, tiny: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def counted(head: AnyHead, hidden: torch.Tensor, groups: Groups, *args: Any, **more: Any) -> Choice:
        seen.append(len(groups.branch))
        return choose(head, hidden, groups, *args, **more)

    monkeypatch.setattr(tiny._core.runner, "choose", counted)
    bare = tiny.generate(Request(ASK, method, greedy(5, ignore_eos=True), trace=False))
    assert seen == [rows] * 5
    traced = tiny.generate(Request(ASK, method, greedy(5, ignore_eos=True)))
    assert seen[5:] == [len(traced.branches)] * 5
    assert bare.token_ids == traced.token_ids
    assert len(bare.branches) == len(traced.branches)
