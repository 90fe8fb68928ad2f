"""Numbers at the ends of their range, through the whole engine: refused by name, or answered with numbers; a
model that gives none fails its request alone."""

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

from ...helpers.sample_requests import greedy
from ...helpers.tiny_model import Tiny, at_rest, write_tensors


def wishes(*weights: float) -> list[Objective]:
    return [Objective(f"Be {index}.", weight) for index, weight in enumerate(weights)]


def asked(method: Any = None, tokens: int = 6, text: str = "Why?", **sampling: Any) -> Request:
    params = SamplingParams(max_tokens=tokens, ignore_eos=True, logprobs=3, **{"seed": 3, **sampling})
    return Request(text, method or Base(), params)


def numbers(output: Output) -> Iterator[float]:
    """All that an answer says in numbers."""
    trace, logprobs = output.trace, output.logprobs
    assert trace is not None
    assert logprobs is not None
    for rows in (trace.weights, trace.rewards, trace.branch_logprobs):
        yield from (number for row in rows for number in row)
    yield from trace.strength
    yield from (kl for kl in trace.kl if kl is not None)
    for token in logprobs:
        yield from (token.logprob, *token.top.values())


def same(one: Output, other: Output) -> bool:
    return repr((one.token_ids, one.text, one.trace, one.logprobs)) == repr(
        (other.token_ids, other.text, other.trace, other.logprobs)
    )


STRONG = {
    "strength": lambda value: ContextSteering(wishes(1), strength=value),
    "guidance_scale": lambda value: Guidance(wishes(1), guidance_scale=value),
    "ratio": lambda value: LinearAlignment(wishes(1), ratio=value),
    "alpha": lambda value: Mato(wishes(1), alpha=value),
    "lam": lambda value: Amulet(wishes(1), lam=1 / value),
    "beta of a reward": lambda value: Mato(wishes(1), utility="reward", beta=value),
}


@pytest.mark.filterwarnings("ignore::trimtab.kernels.common.errors.SteeringWarning")
@pytest.mark.parametrize("value", [1e30, 1e300, math.inf, math.nan])
@pytest.mark.parametrize("name", STRONG)
def test_a_strength_beyond_what_scores_carry_is_refused(name: str, value: float) -> None:
    with pytest.raises(InputError, match="must be"):
        STRONG[name](value)


ODD = {
    "weights of 1e-300": asked(Mato(wishes(1e-300, 2e-300, 5e-324))),
    "weights of 1e300 and 1e-300": asked(Mato(wishes(1e300, 1e-300))),
    "a mixture of both": asked(Mixture(wishes(1e300, 1e-300, 1e300))),
    "no temperature of the weights": asked(Mato(wishes(1, 2, 0), tau=1e-300)),
    "endless rewards": asked(Mato(wishes(1, 2), tau=1e300, beta=1e300)),
    "the largest strength": asked(ContextSteering(wishes(1, 1), strength=1000)),
    "the least": asked(ContextSteering(wishes(1, 1), strength=-1000), temperature=1.0),
    "a region of nothing": asked(Amulet(wishes(1), kl_budget=1e-300)),
    "a region of everything": asked(Guidance(wishes(1), guidance_scale=1000, kl_budget=1e300)),
    "a mask of one token": asked(LinearAlignment(wishes(1), mask_top_p=1e-12, mask_temperature=1e-6)),
    "hardly any temperature": asked(Mato(wishes(1)), temperature=1e-30),
    "the least temperature that draws": asked(temperature=1e-5),
    "the highest temperature": asked(Mato(wishes(1)), temperature=1000.0),
    "hardly any mass": asked(temperature=1.0, top_p=1e-12),
    "all but no mass": asked(temperature=1.0, top_p=1 - 1e-16, min_p=5e-324),
    "every token with a bias": asked(temperature=1.0, logit_bias=dict.fromkeys(range(300), -1e30)),
    "biases apart": asked(repetition_penalty=1000.0, logit_bias={5: 1e30, 6: -1e30, 7: 1e30}),
    "fifteen wishes": asked(Mato(wishes(*range(1, 16)))),
    "fifteen at odds": asked(Mato(wishes(*[10.0**n for n in range(-300, 300, 40)]), tau=1e-9)),
    "one token": Request(
        branch_token_ids=[[5], [6]], steering=Amulet(wishes(1)), sampling=asked(tokens=6).sampling
    ),
}


@pytest.fixture(scope="module")
def healthy(one_engine: Engine) -> Output:
    return one_engine.generate(asked(Mato(wishes(1, 2), kl_budget=0.3), 14, "Who?", temperature=0.8))


@pytest.mark.parametrize("name", ODD)
def test_an_odd_request_gets_numbers_and_its_neighbour_what_it_gets_alone(
    name: str, tiny: Engine, healthy: Output
) -> None:
    odd, beside = tiny.generate(
        [ODD[name], asked(Mato(wishes(1, 2), kl_budget=0.3), 14, "Who?", temperature=0.8)]
    )
    assert same(beside, healthy)
    assert (odd.finish_reason, len(odd.token_ids), odd.error) == ("length", 6, None)
    assert all(map(math.isfinite, numbers(odd)))
    assert odd.trace is not None
    if ODD[name].steering.objectives:
        assert [sum(row) for row in odd.trace.weights] == pytest.approx([1] * 6, abs=1e-12)
    assert same(tiny.generate(ODD[name]), odd)


@pytest.mark.parametrize("bans", ["all", "all but what the mask leaves out"])
def test_a_request_of_which_bans_leave_nothing_fails_alone(bans: str, tiny: Engine, healthy: Output) -> None:
    masked = LinearAlignment(wishes(1), mask_top_p=1e-12)
    kept = tiny.generate(asked(masked, 1)).token_ids
    banned = range(300) if bans == "all" else kept
    odd, beside = tiny.generate(
        [
            asked(masked, 4, min_tokens=2, stop_token_ids=tuple(banned)),
            asked(Mato(wishes(1, 2), kl_budget=0.3), 14, "Who?", temperature=0.8),
        ]
    )
    assert same(beside, healthy)
    assert (odd.finish_reason, odd.token_ids) == ("error", [])
    assert odd.error == "the model gave no finite score to any allowed token at token 1 of the answer"


PLACES = {
    "a row of the head": ("lm_head.weight", (7, slice(None))),
    "one number of the head": ("lm_head.weight", (7, 3)),
    "a norm": ("model.norm.weight", 3),
    "an attention": ("model.layers.0.self_attn.k_proj.weight", (2, 2)),
    "the last layer": ("model.layers.1.mlp.down_proj.weight", (0, slice(None))),
}


@pytest.mark.filterwarnings("ignore:tensor")
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("place", PLACES)
def test_a_model_that_gives_no_numbers_fails_every_answer_with_the_reason(
    place: str, value: float, tmp_path: Path
) -> None:
    tiny = Tiny(tied=False)
    name, at = PLACES[place]
    tensors = tiny.tensors()
    tensors[name][at] = value
    write_tensors(tiny.write(tmp_path), tensors)
    engine = Engine.from_pretrained(str(tmp_path), kv_cache_memory="1MiB")
    methods = [Base(), Mato(wishes(1, 2)), Amulet(wishes(1), kl_budget=0.1), LinearAlignment(wishes(1))]
    for output in engine.generate([asked(method, temperature=t) for method in methods for t in (0.0, 1.0)]):
        assert (output.finish_reason, output.token_ids, output.text) == ("error", [], "")
        assert output.error == "the model gave no finite score to any allowed token at token 1 of the answer"
    with pytest.raises(RunError, match="the model gave no finite score after token 1 of what was scored"):
        engine.score([5, 6])
    assert at_rest(engine)


@pytest.fixture(scope="module")
def poisoned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Engine, int]:
    """A model that breaks after one token: the embedding of byte E2 is NaN.

    A character of three begins with it: when the answer fails after it, half a character is held back.
    """
    tiny = Tiny(tied=False, seed=6)
    folder = tiny.write(tmp_path_factory.mktemp("poisoned"))
    token = Engine.from_pretrained(str(folder), kv_cache_memory="1MiB").tokenizer.encode("┐")[0]
    tensors = tiny.tensors()
    tensors["model.embed_tokens.weight"][token] = torch.nan
    write_tensors(folder, tensors)
    with pytest.warns(UserWarning, match="infinite or none"):
        return Engine.from_pretrained(str(folder), kv_cache_memory="64KiB", max_num_seqs=6), token


def test_a_model_that_breaks_fails_its_own_request_with_a_reason(poisoned: tuple[Engine, int]) -> None:
    engine, token = poisoned
    good = Request("Why?", Prompt([Objective("a")]), greedy(12, ignore_eos=True))
    before = engine.generate(good)
    assert token not in before.token_ids
    bad = Request("a", sampling=greedy(12, logit_bias={token: 1e4}))
    outputs = engine.generate([bad, good, bad, good])
    for output in outputs[::2]:
        assert (output.finish_reason, output.token_ids) == ("error", [token])
        assert output.error == "the model gave no finite score to any allowed token at token 2 of the answer"
        assert output.trace is not None
        assert len(output.trace.branch_logprobs) == 1
    for output in outputs[1::2]:
        assert (output.token_ids, output.trace) == (before.token_ids, before.trace)
    assert at_rest(engine)


def test_pages_and_slots_of_a_broken_request_do_not_harm_the_next(poisoned: tuple[Engine, int]) -> None:
    engine, token = poisoned
    good = Request("Why?", sampling=greedy(12, ignore_eos=True))
    before = engine.generate(good)
    stream = engine.stream(Request("b", sampling=greedy(60, ignore_eos=True, logit_bias={token: -1e9})))
    next(stream)  # keeps the engine from resting, so that slots are used again as they are
    for _ in range(3):
        assert engine.generate(Request("a", sampling=greedy(12, logit_bias={token: 1e4}))).error
        after = engine.generate(good)
        assert (after.token_ids, after.trace) == (before.token_ids, before.trace)
    stream.close()
    assert at_rest(engine)


def test_a_stream_that_fails_still_joins_to_the_text(poisoned: tuple[Engine, int]) -> None:
    engine, token = poisoned
    deltas = list(engine.stream(Request("a", sampling=greedy(12, logit_bias={token: 1e4}))))
    output = deltas[-1].output
    assert output is not None
    assert output.text == "\ufffd" == "".join(delta.text for delta in deltas)
    assert [token_id for delta in deltas for token_id in delta.token_ids] == output.token_ids


def test_a_failed_answer_stays_failed_though_its_rest_is_a_stop_text(poisoned: tuple[Engine, int]) -> None:
    engine, token = poisoned
    output = engine.generate(Request("a", sampling=greedy(12, logit_bias={token: 1e4}, stop=("\ufffd",))))
    assert output.finish_reason == "error"
    assert output.error


@pytest.mark.filterwarnings("ignore:tensor")
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_sick_prompt_in_the_prefix_cache_harms_no_other(value: float, tmp_path: Path) -> None:
    """Its pages are kept, found again by its like, and taken by others when it is forgotten."""
    tiny = Tiny()
    tensors = tiny.tensors()
    tensors["model.embed_tokens.weight"][299] = 0
    write_tensors(tiny.write(tmp_path), tensors)
    make = {"kv_cache_memory": "128KiB", "block_size": 16, "max_num_seqs": 6}
    params = SamplingParams(max_tokens=30, ignore_eos=True)
    healthy = [Request(branch_token_ids=[list(range(n, n + 70))], sampling=params) for n in (5, 9, 40)]
    sick = Request(branch_token_ids=[[*range(5, 50), 299, *range(50, 75)]], sampling=params)
    right = Engine.from_pretrained(str(tmp_path), **make).generate(healthy)
    engine = Engine.from_pretrained(str(tmp_path), **make)
    engine._core.runner.model._embedding[299] = value  # whose product with the last layer has a copy
    for _ in range(3):
        ill, *well = engine.generate([sick, *healthy])
        assert ill.finish_reason == "error"
        assert all(same(one, other) for one, other in zip(well, right, strict=True))
    assert at_rest(engine)


def test_a_vocabulary_of_a_quarter_of_a_million_is_steered_sampled_and_reported(tmp_path: Path) -> None:
    """Its tokenizer has 300 tokens of it; the rows of the others are never chosen."""
    tiny = Tiny(hidden=12, heads=2, kv_heads=1, inner=8, layers=1, rows=262_144)
    engine = Engine.from_pretrained(str(tiny.write(tmp_path)), kv_cache_memory="1MiB")
    requests = [
        asked(Mato(wishes(1, 2), kl_budget=0.2), 3, temperature=1.0, top_p=0.9, top_k=100_000),
        asked(Mato(wishes(*range(1, 16))), 3),
        asked(LinearAlignment(wishes(1)), 3, temperature=1.5, min_p=1e-3),
    ]
    alone = [engine.generate(request) for request in requests]
    for output, single in zip(engine.generate(requests), alone, strict=True):
        assert same(output, single)
        assert output.finish_reason == "length"
        assert max(output.token_ids) < 300
        assert all(map(math.isfinite, numbers(output)))


@pytest.mark.long
def test_an_answer_of_a_hundred_thousand_tokens_stays_in_numbers(tmp_path: Path) -> None:
    tiny = Tiny(hidden=8, heads=1, kv_heads=1, inner=8, layers=1, context=131_072, theta=1e6)
    engine = Engine.from_pretrained(str(tiny.write(tmp_path)), kv_cache_memory="64MiB")
    sampling = SamplingParams(max_tokens=100_000, temperature=1.0, seed=1, ignore_eos=True, logprobs=1)
    output = engine.generate(Request("Why?", Mato(wishes(1, 2)), sampling))
    assert (output.finish_reason, len(output.token_ids)) == ("length", 100_000)
    assert all(map(math.isfinite, numbers(output)))
    assert output.trace is not None
    assert max(abs(sum(row) - 1) for row in output.trace.weights) < 1e-12
    assert at_rest(engine)
