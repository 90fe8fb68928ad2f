"""Greedy tokens of every method against the published loops, implemented with transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from trimtab.engine import (
    Amulet,
    Base,
    ContextSteering,
    Engine,
    Guidance,
    LinearAlignment,
    Mato,
    Mixture,
    Opad,
    Prompt,
    Request,
    SamplingParams,
)

from ...helpers.naive_decoders import check_greedy, ftrl_loop, load_reference
from ...helpers.sample_requests import KIND, ODD, QUESTION, SHORT, TRUE, method_id
from ...helpers.tiny_model import TinyModel

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import LlamaForCausalLM
    from trimtab.engine import Method

PROMPTS = [QUESTION, "Why?", "naïve 👩‍👩‍👧‍👦 " * 8]
METHODS: list[Method] = [
    Base(),
    Prompt([KIND]),
    LinearAlignment([KIND]),
    LinearAlignment([KIND], mask_top_p=None),
    LinearAlignment([KIND], mask_top_p=0.5, mask_temperature=1.7),
    ContextSteering([KIND, SHORT]),
    Guidance([KIND]),
    Opad([KIND]),
    Opad([KIND], gain=0.5),
    Amulet([KIND]),
    Mato([KIND, SHORT]),
    Mato([KIND, SHORT, TRUE, ODD]),
    Mixture([KIND, SHORT, ODD]),
]
GREEDY = SamplingParams(max_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> LlamaForCausalLM:
    return load_reference(tiny_folder)


@pytest.mark.parametrize("method", METHODS, ids=method_id)
def test_greedy_tokens_are_those_of_the_published_loops(
    method: Method, tiny: Engine, model: LlamaForCausalLM
) -> None:
    outputs = tiny.generate([Request(prompt, method, GREEDY) for prompt in PROMPTS])
    assert len({tuple(output.token_ids) for output in outputs}) == len(PROMPTS)
    ties = 0
    for output in outputs:
        agreement = check_greedy(output, method, model, tiny.tokenizer.vocab_size)
        assert agreement.tokens == GREEDY.max_tokens
        assert agreement.holds, agreement.ties
        ties += len(agreement.ties)
        assert output.trace is not None
        if agreement.weights:
            # |Δw| ≤ |ΔR| / τ, and each token adds to R an error of two log-probabilities, 1e-5 each
            for token, (ours, theirs) in enumerate(zip(output.trace.weights, agreement.weights, strict=True)):
                assert ours == pytest.approx(theirs, abs=2e-5 * token + 1e-12)
    assert ties <= 1, "ties that float32 cannot decide are rare"


def test_the_comparison_detects_a_wrong_method(tiny: Engine, model: LlamaForCausalLM) -> None:
    output = tiny.generate(Request(PROMPTS[0], Amulet([KIND]), GREEDY))
    agreement = check_greedy(output, Guidance([KIND], guidance_scale=4.0), model, tiny.tokenizer.vocab_size)
    assert not agreement.holds


def test_one_step_of_the_loop_is_the_published_formula() -> None:
    base, anchor = torch.randn(2, 41, dtype=torch.float64).log_softmax(-1)
    alpha, lam, eta = 0.5, 1.5, 7.0
    by_hand = (lam * anchor + alpha * (anchor - base) + anchor / eta) / (lam + 1 / eta)
    loop = ftrl_loop(base, anchor, alpha, lam, eta, 1)
    torch.testing.assert_close(loop, by_hand.log_softmax(-1), rtol=0, atol=1e-13)


@pytest.mark.parametrize("method", [Amulet([KIND]), Mato([KIND, SHORT])], ids=method_id)
def test_an_untied_sharded_model_follows_the_published_loops_too(method: Method, tmp_path: Path) -> None:
    folder = TinyModel(
        hidden=28, heads=4, kv_heads=1, head_dim=10, layers=3, tied=False, shards=3, seed=5
    ).write(tmp_path / "model")
    engine = Engine.from_pretrained(str(folder), kv_cache_memory="8MiB")
    output = engine.generate(Request(PROMPTS[0], method, GREEDY))
    agreement = check_greedy(output, method, load_reference(folder), engine.tokenizer.vocab_size)
    assert agreement.holds, agreement.ties


def test_the_demo_model_follows_the_published_loops(demo_folder: Path) -> None:
    engine = Engine.from_pretrained(str(demo_folder), dtype="float32", kv_cache_memory="256MiB")
    methods = [Base(), Amulet([KIND]), Mato([KIND, SHORT])]
    sampling = SamplingParams(max_tokens=6)
    outputs = engine.generate([Request("What is rain?", method, sampling) for method in methods])
    model = load_reference(demo_folder)
    for output, method in zip(outputs, methods, strict=True):
        agreement = check_greedy(output, method, model, engine.tokenizer.vocab_size)
        assert agreement.holds, (method.name, agreement.ties)
