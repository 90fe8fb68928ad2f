"""Reported log-probabilities match those of `Engine.score`."""

from __future__ import annotations

import pytest
from trimtab.engine import Amulet, Engine, Mixture, Request

from ..helpers.sample_requests import KIND, QUESTION, SHORT, greedy_params, prompt_ids, sampled_params


def test_log_probabilities_are_those_of_scoring_the_finished_text(tiny: Engine) -> None:
    output = tiny.generate(Request(QUESTION, sampling=sampled_params(5, 30, logprobs=20)))
    prompt = prompt_ids(output)[0]
    scores = tiny.score(prompt + output.token_ids)[len(prompt) - 1 : -1]
    assert output.logprobs is not None
    assert output.trace is not None
    assert len(output.logprobs) == 30
    for position, (entry, row) in enumerate(zip(output.logprobs, scores, strict=True)):
        assert entry.token_id == output.token_ids[position]
        assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-4)
        assert entry.logprob == pytest.approx(output.trace.branch_logprobs[position][0], abs=1e-5)
        assert len(entry.top) == 20
        assert [*entry.top.values()] == sorted(entry.top.values(), reverse=True)
        values = row.topk(20).values.tolist()
        assert [*entry.top.values()] == pytest.approx(values, abs=1e-4)
        assert all(value == pytest.approx(float(row[token]), abs=1e-4) for token, value in entry.top.items())


def test_the_requested_number_of_log_probabilities_is_reported(tiny: Engine) -> None:
    for count in (0, 1, 20):
        output = tiny.generate(Request("Why?", Amulet([KIND]), greedy_params(4, logprobs=count), trace=False))
        assert output.logprobs is not None
        assert [len(entry.top) for entry in output.logprobs] == [count] * len(output.token_ids)
        assert all(entry.logprob <= 0 for entry in output.logprobs)
    assert tiny.generate(Request("Why?", sampling=greedy_params(2))).logprobs is None


def test_log_probabilities_of_a_steered_answer_are_of_the_mixture_before_temperature(tiny: Engine) -> None:
    method = Mixture([KIND, SHORT])
    output = tiny.generate(Request(QUESTION, method, sampled_params(8, 10, logprobs=5, top_k=3)))
    assert output.logprobs is not None
    rows = [
        tiny.score(prompt + output.token_ids)[len(prompt) - 1 : -1].double() for prompt in prompt_ids(output)
    ]
    mixed = (0.75 * rows[1] + 0.25 * rows[2]).log_softmax(-1)
    for entry, row in zip(output.logprobs, mixed, strict=True):
        assert entry.logprob == pytest.approx(float(row[entry.token_id]), abs=1e-4)
        assert [*entry.top.values()] == pytest.approx(row.topk(5).values.tolist(), abs=1e-4)
