"""Engine: lists, samples and batches give the answers of single requests; invalid requests are refused."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import torch
from trimtab.engine import Amulet, Engine, Mato, Opad, Request, SamplingParams
from trimtab.kernels.common.errors import InputError

from ..harness import get_runner
from ..helpers.invariance_marks import batch_invariant_cpu
from ..helpers.sample_requests import (
    KIND,
    METHODS,
    QUESTION,
    SHORT,
    greedy_params,
    prompt_ids,
    sampled_params,
)
from ..helpers.tiny_model import TinyModel

if TYPE_CHECKING:
    from pathlib import Path

# Lists, errors, seeds


def test_a_list_is_answered_in_order_and_wrong_members_do_not_stop_it(tiny: Engine) -> None:
    wrong = [
        Request("x " * 600),
        Request(branch_token_ids=[[1, 300]]),
        Request(branch_token_ids=[[1, 2**40]]),
        Request(branch_token_ids=[[-1]]),
        Request("Why?", sampling=SamplingParams(logit_bias={307: 1.0})),
        Request("Why?", sampling=SamplingParams(stop_token_ids=(-1,))),
        Request([{"role": "user", "content": "Why?"}, {"role": "user", "content": "How?", 5: object()}]),
        Request("\ud800"),
    ]
    message = [
        r"the prompt of branch 'base' has \d+ tokens; .* max_model_len, which is 512",
        "branch_token_ids has token id 300; the model's ids are 0 to 299",
        f"branch_token_ids has token id {2**40}",
        "branch_token_ids has token id -1",
        "logit_bias has token id 307",
        "stop_token_ids has token id -1",
        "chat template variables must be JSON values",
        "must be valid Unicode",
    ]
    right = [
        Request(prompt, method, greedy_params(6)) for prompt, method in zip("abcdefgh", METHODS, strict=False)
    ]
    outputs = tiny.generate([request for pair in zip(wrong, right, strict=True) for request in pair])
    for output, sentence in zip(outputs[::2], message, strict=True):
        assert output.finish_reason == "error"
        assert output.error is not None
        assert re.search(sentence, output.error)
        assert (output.text, output.token_ids) == ("", [])
        assert [o.error for o in output.outputs] == [output.error]
    for output, request in zip(outputs[1::2], right, strict=True):
        assert output.error is None
        assert output.token_ids == tiny.generate(request).token_ids
        assert f"user\n{request.prompt}<" in output.branches[0].prompt
    for request, sentence in zip(wrong, message, strict=True):
        with pytest.raises(InputError, match=sentence):
            tiny.generate(request)
        with pytest.raises(InputError, match=sentence):
            tiny.stream(request)


def test_an_empty_list_has_no_answers(tiny: Engine) -> None:
    assert tiny.generate([]) == []


def test_score_refuses_empty_too_many_and_unknown_ids(tiny: Engine) -> None:
    for ids, message in (
        ([], "0 ids; it must have 1 to 512"),
        ([5] * 513, "513 ids"),
        ([300], "id 300"),
        ([-1], "id -1"),
    ):
        with pytest.raises(InputError, match=message):
            tiny.score(ids)
    assert tiny.score([5] * 512).shape == (512, 307)


def test_bias_and_stop_ids_may_outnumber_the_context_length(tiny_folder: Path) -> None:
    engine = Engine.from_pretrained(str(tiny_folder), kv_cache_memory="1MiB", max_model_len=64)
    bans = dict.fromkeys(range(100), -1e9)
    output = engine.generate(
        Request("Why?", sampling=greedy_params(5, logit_bias=bans, stop_token_ids=range(250, 290)))
    )
    assert min(output.token_ids) >= 100


def test_a_model_that_lacks_tokens_of_its_tokenizer_is_refused_with_both_numbers(tmp_path: Path) -> None:
    folder = TinyModel(vocab_size=290, tied=False).write(tmp_path / "short")  # the tokenizer has ids to 299
    with pytest.raises(InputError, match=r"the tokenizer has id 299, .* the model's embedding has 290 rows"):
        Engine.from_pretrained(str(folder), kv_cache_memory="1MiB")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_engine_reports_its_device_and_dtype(tiny_folder: Path, dtype: str) -> None:
    engine = Engine.from_pretrained(str(tiny_folder), dtype=dtype, kv_cache_memory="1MiB")
    assert (engine.device, engine.dtype) == (torch.device("cpu"), getattr(torch, dtype))
    assert get_runner(engine).cache.blocks.dtype == engine.dtype


def test_samples_differ_in_seed_and_each_can_be_reproduced_alone(tiny: Engine) -> None:
    request = Request(QUESTION, Mato([KIND, SHORT]), sampled_params(40, n=4))
    output = tiny.generate(request)
    assert [sample.seed for sample in output.outputs] == [40, 41, 42, 43]
    assert replace(output, outputs=[]) == replace(output.outputs[0], outputs=[])
    assert len({tuple(sample.token_ids) for sample in output.outputs}) == 4
    for sample in output.outputs:
        alone = tiny.generate(replace(request, sampling=sampled_params(sample.seed)))
        assert (alone.token_ids, alone.trace) == (sample.token_ids, sample.trace)


def test_a_drawn_seed_is_reported_and_reproduces_the_answer(tiny: Engine) -> None:
    sampling = SamplingParams(max_tokens=12, temperature=1.0, n=2)
    for sample in tiny.generate(Request(QUESTION, sampling=sampling)).outputs:
        again = tiny.generate(Request(QUESTION, sampling=replace(sampling, n=1, seed=sample.seed)))
        assert again.token_ids == sample.token_ids


def test_every_reported_seed_can_be_requested(tiny: Engine) -> None:
    output = tiny.generate(Request("Why?", sampling=sampled_params(2**64 - 1, 6, n=2)))
    for sample in output.outputs:
        again = tiny.generate(Request("Why?", sampling=sampled_params(sample.seed, 6)))
        assert again.token_ids == sample.token_ids


def test_an_engine_with_a_seed_draws_the_same_seeds_again(tiny_folder: Path, tiny: Engine) -> None:
    def seeds(seed: int | None) -> list[int]:
        engine = Engine.from_pretrained(str(tiny_folder), kv_cache_memory="1MiB", seed=seed)
        return [output.seed for output in engine.generate([Request("Why?", sampling=greedy_params(1))] * 3)]

    assert seeds(7) == seeds(7)
    assert len({*seeds(7), *seeds(8), *seeds(None), *seeds(None)}) == 12


def test_greedy_answers_do_not_depend_on_the_seed(tiny: Engine) -> None:
    one, two = tiny.generate([Request(QUESTION, sampling=greedy_params(seed=seed)) for seed in (1, 2)])
    assert one.token_ids == two.token_ids
    assert (one.seed, two.seed) == (1, 2)


# Batches


def mixed_requests() -> list[Request]:
    """Every method, zero to four objectives, greedy and sampled, prompts of many lengths."""
    prompts = [QUESTION, "Why?", "naïve 👩‍👩‍👧‍👦 " * 6, "Hello there, you two worms! " * 9]
    return [
        Request(prompts[i % 4], method, sampled_params(i) if i % 3 else greedy_params(8 + i, logprobs=3))
        for i, method in enumerate(METHODS)
    ]


@batch_invariant_cpu
def test_a_request_in_a_batch_is_bit_identical_to_the_request_alone(tiny_folder: Path) -> None:
    engine = Engine.from_pretrained(str(tiny_folder), kv_cache_memory="8MiB", max_num_batched_tokens=9999)
    for request, batched in zip(mixed_requests(), engine.generate(mixed_requests()), strict=True):
        alone = engine.generate(request)
        assert batched.token_ids == alone.token_ids, request.steering.name
        assert batched.trace == alone.trace, request.steering.name
        assert batched.logprobs == alone.logprobs, request.steering.name
        assert batched.text == alone.text


def test_state_rows_are_clean_for_the_next_request(tiny: Engine) -> None:
    request = Request("Why?", Opad([KIND]), greedy_params(8))
    first = tiny.generate(request)
    tiny.generate([Request(QUESTION, method, sampled_params(3, 5)) for method in METHODS])
    assert tiny.generate(request).trace == first.trace


# Prompts, texts, steering


def test_text_without_stops_is_the_decoding_of_all_its_tokens(tiny: Engine) -> None:
    for seed in range(4):
        output = tiny.generate(Request(QUESTION, sampling=replace(sampled_params(seed, 60), temperature=3.0)))
        assert output.text == tiny.tokenizer.decode(output.token_ids)


def test_a_prompt_given_as_ids_gets_the_answer_of_its_text(tiny: Engine) -> None:
    method = Mato([KIND, SHORT])
    rendered = tiny.generate(Request(QUESTION, method, greedy_params(30, ignore_eos=True)))
    exact = tiny.generate(
        Request(
            branch_token_ids=prompt_ids(rendered),
            steering=method,
            sampling=greedy_params(30, ignore_eos=True),
        )
    )
    assert exact.token_ids == rendered.token_ids
    assert [(b.name, b.prompt) for b in exact.branches] == [(b.name, b.prompt) for b in rendered.branches]
    assert exact.trace == rendered.trace


@pytest.mark.parametrize("budget", [0.01, 0.2, 1.0])
def test_a_trust_region_is_obeyed_at_every_token(budget: float, tiny: Engine) -> None:
    method = Amulet([KIND], kl_budget=budget)
    output = tiny.generate(Request(QUESTION, method, greedy_params(30, ignore_eos=True)))
    assert output.trace is not None
    limit = method.coefficients().objective_coef
    assert all(kl is not None and kl <= budget + 1e-4 for kl in output.trace.kl)
    assert all(1 <= a <= limit for a in output.trace.strength)
    assert any(a < limit for a in output.trace.strength), "the trust region was never active"
    free = tiny.generate(Request(QUESTION, Amulet([KIND]), greedy_params(30, ignore_eos=True)))
    assert output.token_ids != free.token_ids


def test_branches_are_named_and_differ_only_by_their_objective(tiny: Engine) -> None:
    for placement in ("system", "user"):
        output = tiny.generate(Request(QUESTION, Mato([KIND, SHORT], placement=placement), greedy_params(2)))
        assert [branch.name for branch in output.branches] == ["base", KIND.text, SHORT.text]
        for branch in output.branches[1:]:
            assert branch.prompt.replace(f" {branch.name}", "") == output.branches[0].prompt
            assert branch.prompt_token_ids == tiny.tokenizer.encode(branch.prompt)


def test_steered_answers_differ_from_each_other(tiny: Engine) -> None:
    """Otherwise other tests could pass because the model ignores its prompt."""
    outputs = tiny.generate(
        [Request(QUESTION, method, greedy_params(25, ignore_eos=True)) for method in METHODS]
    )
    assert len({tuple(output.token_ids) for output in outputs}) >= len(METHODS) - 1


def test_timings_match_the_wall_clock(tiny: Engine) -> None:
    timings = tiny.generate(Request(QUESTION, Amulet([KIND]), greedy_params(20, ignore_eos=True))).timings
    assert min(timings.queue, timings.prefill, timings.decode) >= 0
    assert timings.tokens_per_second == pytest.approx(19 / timings.decode)
