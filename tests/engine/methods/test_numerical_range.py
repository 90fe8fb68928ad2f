"""Extreme values through the engine: refused by name, or answered with finite numbers.

A model that returns NaN fails only the request that meets it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from trimtab import Engine, InputError, Mato, Objective, Request, RunError
from trimtab.engine import (
    Amulet,
    Base,
    ContextSteering,
    Guidance,
    LinearAlignment,
    Mixture,
    Prompt,
    SamplingParams,
)
from trimtab.engine.outputs import Output

from ...harness import get_runner
from ...helpers.sample_requests import greedy_params
from ...helpers.tiny_model import TinyModel, is_idle, write_tensors


def make_objectives(*weights: float) -> list[Objective]:
    return [Objective(f"Be {index}.", weight) for index, weight in enumerate(weights)]


def make_request(method: Any = None, max_tokens: int = 6, text: str = "Why?", **sampling: Any) -> Request:
    params = SamplingParams(max_tokens=max_tokens, ignore_eos=True, logprobs=3, **{"seed": 3, **sampling})
    return Request(text, method or Base(), params)


def all_numbers(output: Output) -> Iterator[float]:
    """All floats of an output."""
    trace, logprobs = output.trace, output.logprobs
    assert trace is not None
    assert logprobs is not None
    for rows in (trace.weights, trace.rewards, trace.branch_logprobs):
        yield from (number for row in rows for number in row)
    yield from trace.strength
    yield from (kl for kl in trace.kl if kl is not None)
    for token in logprobs:
        yield from (token.logprob, *token.top.values())


def same_output(a: Output, b: Output) -> bool:
    return repr((a.token_ids, a.text, a.trace, a.logprobs)) == repr(
        (b.token_ids, b.text, b.trace, b.logprobs)
    )


STRONG_METHODS = {
    "strength": lambda value: ContextSteering(make_objectives(1), strength=value),
    "guidance_scale": lambda value: Guidance(make_objectives(1), guidance_scale=value),
    "ratio": lambda value: LinearAlignment(make_objectives(1), ratio=value),
    "alpha": lambda value: Mato(make_objectives(1), alpha=value),
    "lam": lambda value: Amulet(make_objectives(1), lam=1 / value),
    "beta of a reward": lambda value: Mato(make_objectives(1), utility="reward", beta=value),
}


@pytest.mark.filterwarnings("ignore::trimtab.kernels.common.errors.SteeringWarning")
@pytest.mark.parametrize("value", [1e30, 1e300, math.inf, math.nan])
@pytest.mark.parametrize("name", STRONG_METHODS)
def test_a_strength_beyond_the_range_of_scores_is_refused(name: str, value: float) -> None:
    with pytest.raises(InputError, match="must be"):
        STRONG_METHODS[name](value)


ODD_REQUESTS = {
    "weights of 1e-300": make_request(Mato(make_objectives(1e-300, 2e-300, 5e-324))),
    "weights of 1e300 and 1e-300": make_request(Mato(make_objectives(1e300, 1e-300))),
    "a mixture of 1e300 and 1e-300": make_request(Mixture(make_objectives(1e300, 1e-300, 1e300))),
    "a tiny tau": make_request(Mato(make_objectives(1, 2, 0), tau=1e-300)),
    "a huge tau and beta": make_request(Mato(make_objectives(1, 2), tau=1e300, beta=1e300)),
    "the largest strength": make_request(ContextSteering(make_objectives(1, 1), strength=1000)),
    "the smallest strength": make_request(
        ContextSteering(make_objectives(1, 1), strength=-1000), temperature=1.0
    ),
    "a tiny trust region": make_request(Amulet(make_objectives(1), kl_budget=1e-300)),
    "a huge trust region": make_request(Guidance(make_objectives(1), guidance_scale=1000, kl_budget=1e300)),
    "a mask of one token": make_request(
        LinearAlignment(make_objectives(1), mask_top_p=1e-12, mask_temperature=1e-6)
    ),
    "a tiny temperature": make_request(Mato(make_objectives(1)), temperature=1e-30),
    "the lowest temperature that samples": make_request(temperature=1e-5),
    "the highest temperature": make_request(Mato(make_objectives(1)), temperature=1000.0),
    "a tiny top_p": make_request(temperature=1.0, top_p=1e-12),
    "a top_p just below 1": make_request(temperature=1.0, top_p=1 - 1e-16, min_p=5e-324),
    "every token with a bias": make_request(temperature=1.0, logit_bias=dict.fromkeys(range(300), -1e30)),
    "biases of opposite extremes": make_request(
        repetition_penalty=1000.0, logit_bias={5: 1e30, 6: -1e30, 7: 1e30}
    ),
    "fifteen objectives": make_request(Mato(make_objectives(*range(1, 16)))),
    "fifteen objectives of extreme weights": make_request(
        Mato(make_objectives(*[10.0**n for n in range(-300, 300, 40)]), tau=1e-9)
    ),
    "one token": Request(
        branch_token_ids=[[5], [6]],
        steering=Amulet(make_objectives(1)),
        sampling=make_request(max_tokens=6).sampling,
    ),
}


@pytest.fixture(scope="module")
def healthy(tiny_engine: Engine) -> Output:
    return tiny_engine.generate(
        make_request(Mato(make_objectives(1, 2), kl_budget=0.3), 14, "Who?", temperature=0.8)
    )


@pytest.mark.parametrize("name", ODD_REQUESTS)
def test_an_extreme_request_gets_finite_numbers_and_changes_no_neighbour(
    name: str, tiny: Engine, healthy: Output
) -> None:
    odd, beside = tiny.generate(
        [
            ODD_REQUESTS[name],
            make_request(Mato(make_objectives(1, 2), kl_budget=0.3), 14, "Who?", temperature=0.8),
        ]
    )
    assert same_output(beside, healthy)
    assert (odd.finish_reason, len(odd.token_ids), odd.error) == ("length", 6, None)
    assert all(map(math.isfinite, all_numbers(odd)))
    assert odd.trace is not None
    if ODD_REQUESTS[name].steering.objectives:
        assert [sum(row) for row in odd.trace.weights] == pytest.approx([1] * 6, abs=1e-12)
    assert same_output(tiny.generate(ODD_REQUESTS[name]), odd)


@pytest.mark.parametrize("bans", ["all", "all in the mask"])
def test_a_request_with_every_token_banned_fails_alone(bans: str, tiny: Engine, healthy: Output) -> None:
    masked = LinearAlignment(make_objectives(1), mask_top_p=1e-12)
    kept_ids = tiny.generate(make_request(masked, 1)).token_ids
    banned = range(300) if bans == "all" else kept_ids
    odd, beside = tiny.generate(
        [
            make_request(masked, 4, min_tokens=2, stop_token_ids=tuple(banned)),
            make_request(Mato(make_objectives(1, 2), kl_budget=0.3), 14, "Who?", temperature=0.8),
        ]
    )
    assert same_output(beside, healthy)
    assert (odd.finish_reason, odd.token_ids) == ("error", [])
    assert odd.error == "the model gave no finite score to any allowed token at token 1 of the answer"


BROKEN_WEIGHTS = {
    "a row of the LM head": ("lm_head.weight", (7, slice(None))),
    "one element of the LM head": ("lm_head.weight", (7, 3)),
    "a norm": ("model.norm.weight", 3),
    "an attention": ("model.layers.0.self_attn.k_proj.weight", (2, 2)),
    "the last layer": ("model.layers.1.mlp.down_proj.weight", (0, slice(None))),
}


@pytest.mark.filterwarnings("ignore:tensor")
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("weight_name", BROKEN_WEIGHTS)
def test_a_model_with_nan_weights_fails_every_answer_with_the_reason(
    weight_name: str, value: float, tmp_path: Path
) -> None:
    tiny = TinyModel(tied=False)
    name, at = BROKEN_WEIGHTS[weight_name]
    tensors = tiny.tensors()
    tensors[name][at] = value
    write_tensors(tiny.write(tmp_path), tensors)
    engine = Engine.from_pretrained(str(tmp_path), kv_cache_memory="1MiB")
    methods = [
        Base(),
        Mato(make_objectives(1, 2)),
        Amulet(make_objectives(1), kl_budget=0.1),
        LinearAlignment(make_objectives(1)),
    ]
    for output in engine.generate(
        [make_request(method, temperature=t) for method in methods for t in (0.0, 1.0)]
    ):
        assert (output.finish_reason, output.token_ids, output.text) == ("error", [], "")
        assert output.error == "the model gave no finite score to any allowed token at token 1 of the answer"
    with pytest.raises(RunError, match="the model gave no finite score after token 1 of token_ids"):
        engine.score([5, 6])
    assert is_idle(engine)


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Engine, int]:
    """A model that returns NaN after one token: the embedding of byte E2 is NaN.

    A three-byte character begins with it: an answer that fails after it has a pending incomplete character.
    """
    tiny = TinyModel(tied=False, seed=6)
    folder = tiny.write(tmp_path_factory.mktemp("poisoned"))
    token = Engine.from_pretrained(str(folder), kv_cache_memory="1MiB").tokenizer.encode("┐")[0]
    tensors = tiny.tensors()
    tensors["model.embed_tokens.weight"][token] = torch.nan
    write_tensors(folder, tensors)
    with pytest.warns(UserWarning, match="infinite or NaN"):
        return Engine.from_pretrained(str(folder), kv_cache_memory="64KiB", max_num_seqs=6), token


def test_a_request_that_meets_nan_fails_alone_with_the_reason(poisoned: tuple[Engine, int]) -> None:
    engine, token = poisoned
    good = Request("Why?", Prompt([Objective("a")]), greedy_params(12, ignore_eos=True))
    before = engine.generate(good)
    assert token not in before.token_ids
    bad = Request("a", sampling=greedy_params(12, logit_bias={token: 1e4}))
    outputs = engine.generate([bad, good, bad, good])
    for output in outputs[::2]:
        assert (output.finish_reason, output.token_ids) == ("error", [token])
        assert output.error == "the model gave no finite score to any allowed token at token 2 of the answer"
        assert output.trace is not None
        assert len(output.trace.branch_logprobs) == 1
    for output in outputs[1::2]:
        assert (output.token_ids, output.trace) == (before.token_ids, before.trace)
    assert is_idle(engine)


def test_blocks_and_rows_of_a_failed_request_do_not_harm_the_next(poisoned: tuple[Engine, int]) -> None:
    engine, token = poisoned
    good = Request("Why?", sampling=greedy_params(12, ignore_eos=True))
    before = engine.generate(good)
    stream = engine.stream(
        Request("b", sampling=greedy_params(60, ignore_eos=True, logit_bias={token: -1e9}))
    )
    next(stream)  # keeps the engine busy, so that slots are reused without a reset
    for _ in range(3):
        assert engine.generate(Request("a", sampling=greedy_params(12, logit_bias={token: 1e4}))).error
        after = engine.generate(good)
        assert (after.token_ids, after.trace) == (before.token_ids, before.trace)
    stream.close()
    assert is_idle(engine)


def test_the_deltas_of_a_failed_stream_join_to_its_text(poisoned: tuple[Engine, int]) -> None:
    engine, token = poisoned
    deltas = list(engine.stream(Request("a", sampling=greedy_params(12, logit_bias={token: 1e4}))))
    output = deltas[-1].output
    assert output is not None
    assert output.text == "\ufffd" == "".join(delta.text for delta in deltas)
    assert [token_id for delta in deltas for token_id in delta.token_ids] == output.token_ids


def test_a_failed_answer_stays_failed_if_its_pending_text_is_a_stop_string(
    poisoned: tuple[Engine, int],
) -> None:
    engine, token = poisoned
    output = engine.generate(
        Request("a", sampling=greedy_params(12, logit_bias={token: 1e4}, stop=("\ufffd",)))
    )
    assert output.finish_reason == "error"
    assert output.error


@pytest.mark.filterwarnings("ignore:tensor")
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_nan_prompt_in_the_prefix_cache_harms_no_other(value: float, tmp_path: Path) -> None:
    """Its blocks are cached, looked up by the same prompt, and reused by other requests after eviction."""
    tiny = TinyModel()
    tensors = tiny.tensors()
    tensors["model.embed_tokens.weight"][299] = 0
    write_tensors(tiny.write(tmp_path), tensors)
    make = {"kv_cache_memory": "128KiB", "block_size": 16, "max_num_seqs": 6}
    params = SamplingParams(max_tokens=30, ignore_eos=True)
    healthy = [Request(branch_token_ids=[list(range(n, n + 70))], sampling=params) for n in (5, 9, 40)]
    sick = Request(branch_token_ids=[[*range(5, 50), 299, *range(50, 75)]], sampling=params)
    right = Engine.from_pretrained(str(tmp_path), **make).generate(healthy)
    engine = Engine.from_pretrained(str(tmp_path), **make)
    get_runner(engine).model._embed_tokens[299] = value  # the LM head has a copy of the weights
    for _ in range(3):
        ill, *well = engine.generate([sick, *healthy])
        assert ill.finish_reason == "error"
        assert all(same_output(one, other) for one, other in zip(well, right, strict=True))
    assert is_idle(engine)


def test_a_vocabulary_of_a_quarter_of_a_million_is_steered_sampled_and_reported(tmp_path: Path) -> None:
    """The tokenizer has 300 of its tokens; rows without a token are never sampled."""
    tiny = TinyModel(hidden=12, heads=2, kv_heads=1, intermediate=8, layers=1, vocab_size=262_144)
    engine = Engine.from_pretrained(str(tiny.write(tmp_path)), kv_cache_memory="1MiB")
    requests = [
        make_request(
            Mato(make_objectives(1, 2), kl_budget=0.2), 3, temperature=1.0, top_p=0.9, top_k=100_000
        ),
        make_request(Mato(make_objectives(*range(1, 16))), 3),
        make_request(LinearAlignment(make_objectives(1)), 3, temperature=1.5, min_p=1e-3),
    ]
    alone = [engine.generate(request) for request in requests]
    for output, single in zip(engine.generate(requests), alone, strict=True):
        assert same_output(output, single)
        assert output.finish_reason == "length"
        assert max(output.token_ids) < 300
        assert all(map(math.isfinite, all_numbers(output)))


@pytest.mark.long
def test_an_answer_of_a_hundred_thousand_tokens_stays_finite(tmp_path: Path) -> None:
    tiny = TinyModel(hidden=8, heads=1, kv_heads=1, intermediate=8, layers=1, max_length=131_072, theta=1e6)
    engine = Engine.from_pretrained(str(tiny.write(tmp_path)), kv_cache_memory="64MiB")
    sampling = SamplingParams(max_tokens=100_000, temperature=1.0, seed=1, ignore_eos=True, logprobs=1)
    output = engine.generate(Request("Why?", Mato(make_objectives(1, 2)), sampling))
    assert (output.finish_reason, len(output.token_ids)) == ("length", 100_000)
    assert all(map(math.isfinite, all_numbers(output)))
    assert output.trace is not None
    assert max(abs(sum(row) - 1) for row in output.trace.weights) < 1e-12
    assert is_idle(engine)
