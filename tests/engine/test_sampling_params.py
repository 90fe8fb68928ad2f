"""SamplingParams: ranges, defaults and immutability."""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import numpy as np
import pytest
from trimtab.engine import Engine, Request, SamplingParams
from trimtab.kernels.common.errors import InputError

INF, NAN = math.inf, math.nan

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"n": 0}, "n is 0; it must be an integer from 1 to 128"),
    ({"n": 129}, "n is 129; it must be an integer from 1 to 128"),
    ({"n": 1.5}, "n is 1.5; it must be an integer"),
    ({"max_tokens": 0}, "max_tokens is 0"),
    ({"max_tokens": -4}, "max_tokens is -4"),
    ({"min_tokens": -1}, "min_tokens is -1"),
    ({"min_tokens": 9, "max_tokens": 8}, "min_tokens is 9; it must be from 0 to max_tokens (8)"),
    ({"temperature": -0.1}, "temperature is -0.1"),
    ({"temperature": NAN}, "temperature is nan"),
    ({"temperature": INF}, "temperature is inf"),
    ({"temperature": 1000.1}, "temperature is 1000.1; it must be a finite number ≥ 0 and at most 1000"),
    ({"top_k": -1}, "top_k is -1"),
    ({"top_k": 2.5}, "top_k is 2.5"),
    ({"top_p": 0.0}, "top_p is 0.0"),
    ({"top_p": 1.01}, "top_p is 1.01"),
    ({"top_p": NAN}, "top_p is nan"),
    ({"min_p": -0.1}, "min_p is -0.1"),
    ({"min_p": 1.1}, "min_p is 1.1"),
    ({"seed": 2**64}, f"seed is {2**64}"),
    ({"seed": -(2**63) - 1}, f"seed is {-(2**63) - 1}"),
    ({"stop": ("ok", "")}, "stop is ('ok', '')"),
    ({"stop": ""}, "stop is ('',)"),
    ({"stop": (5,)}, "item 0 of stop is 5; it must be a string"),
    ({"logprobs": -1}, "logprobs is -1"),
    ({"logprobs": 21}, "logprobs is 21; it must be 0 to 20"),
    ({"logit_bias": {5: INF}}, "logit_bias is {5: inf}"),
    ({"logit_bias": {5: NAN}}, "logit_bias is {5: nan}"),
    (
        {"logit_bias": {5: 1, 6: -2e30}},
        "logit_bias is {5: 1.0, 6: -2e+30}; it must be finite numbers by token id, from -1e+30",
    ),
    ({"logit_bias": {5.5: 1.0}}, "a key of logit_bias is 5.5; it must be an integer"),
    ({"logit_bias": {"5": 1.0}}, "a key of logit_bias is '5'"),
    ({"logit_bias": {5: "1"}}, "item 5 of logit_bias is '1'; it must be a number"),
    ({"seed": 1.5}, "seed is 1.5; it must be an integer, or none"),
    ({"stop_token_ids": (3, 4.0)}, "item 1 of stop_token_ids is 4.0"),
    ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
    ({"repetition_penalty": INF}, "repetition_penalty is inf"),
    ({"repetition_penalty": 1e-300}, "repetition_penalty is 1e-300; it must be from 0.001 to 1000"),
    ({"presence_penalty": 2.1}, "presence_penalty is 2.1"),
    ({"presence_penalty": NAN}, "presence_penalty is nan"),
    ({"frequency_penalty": -2.1}, "frequency_penalty is -2.1"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED, ids=[str(fields) for fields, _ in REFUSED])
def test_a_field_out_of_range_is_refused_by_name_and_value(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)) as refused:
        SamplingParams(**fields)
    assert "it must be" in str(refused.value)


@pytest.mark.parametrize(
    "fields",
    [
        {"min_tokens": 8, "max_tokens": 8},
        {"temperature": 0},
        {"temperature": 1000, "repetition_penalty": 1000, "logit_bias": {5: 1e30, 6: -1e30}},
        {"repetition_penalty": 0.001},
        {"top_p": 1.0, "min_p": 1.0, "top_k": 0},
        {"seed": 2**64 - 1},
        {"seed": -(2**63)},
        {"logprobs": 0},
        {"logprobs": 20},
        {"presence_penalty": -2, "frequency_penalty": 2},
        {"logit_bias": {}},
    ],
    ids=str,
)
def test_the_bounds_of_every_range_are_allowed(fields: dict[str, Any]) -> None:
    params = SamplingParams(**fields)
    assert all(getattr(params, name) == value for name, value in fields.items())


def test_a_single_stop_string_need_not_be_a_list() -> None:
    assert SamplingParams(stop="end").stop == ("end",)
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")
    assert SamplingParams(stop_token_ids=[3, 4]).stop_token_ids == (3, 4)


def test_numpy_numbers_become_python_numbers() -> None:
    params = SamplingParams(
        n=np.int64(2),
        min_p=np.float32(0.5),
        stop_token_ids=np.array([3, 4]),
        logit_bias={np.int32(5): np.int8(1)},
    )
    values = (params.n, params.min_p, *params.stop_token_ids, *params.logit_bias, *params.logit_bias.values())
    assert values == (2, 0.5, 3, 4, 5, 1.0)
    assert [type(number) for number in values] == [int, float, int, int, int, float]


def test_later_changes_by_the_caller_do_not_reach_the_params() -> None:
    bias = {5: 1.0}
    params = SamplingParams(logit_bias=bias)
    bias[6] = 2.0
    assert params.logit_bias == {5: 1.0}


def test_sampling_is_greedy_and_neutral_by_default() -> None:
    params = SamplingParams()
    assert (params.n, params.temperature, params.top_k, params.top_p, params.min_p) == (1, 0, 0, 1, 0)
    assert (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) == (1, 0, 0)
    assert (params.seed, params.stop, params.logprobs, params.min_tokens) == (None, (), None, 0)


def test_two_sampling_params_do_not_share_a_bias() -> None:
    assert SamplingParams().logit_bias is not SamplingParams().logit_bias


def test_sampling_params_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SamplingParams().n = 2  # type: ignore[misc]


@pytest.mark.parametrize("hot", [0, 1e-5, 1000])
@pytest.mark.parametrize("penalty", [0.001, 1, 1000])
def test_a_banned_token_is_not_sampled_at_extreme_settings(tiny: Engine, hot: float, penalty: float) -> None:
    bias = {5: -1e30, 6: 1e30, **dict.fromkeys(tiny.tokenizer.eos_token_ids, 1e30)}
    sampling = SamplingParams(
        max_tokens=8, min_tokens=8, temperature=hot, seed=1, repetition_penalty=penalty, logit_bias=bias
    )
    output = tiny.generate(Request("Why?", sampling=sampling))
    assert (output.error, output.token_ids) == (None, [6] * 8)
