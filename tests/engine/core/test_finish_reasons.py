"""Finish reasons: max_tokens, context length, end-of-text token, stop token id, stop string."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from trimtab.engine import Amulet, Engine, Request, SamplingParams

from ...harness import get_runner
from ...helpers.sample_requests import KIND, QUESTION, greedy_params, prompt_ids

if TYPE_CHECKING:
    from pathlib import Path

    from trimtab.engine.outputs import Output

EOS = 2


def test_answers_end_at_max_tokens(tiny: Engine) -> None:
    output = tiny.generate(Request(QUESTION, sampling=greedy_params(7, ignore_eos=True)))
    assert (len(output.token_ids), output.finish_reason) == (7, "length")
    assert output.text == tiny.tokenizer.decode(output.token_ids)


def test_an_answer_ends_where_the_longest_branch_fills_the_context(tiny_folder: Path) -> None:
    engine = Engine.from_pretrained(str(tiny_folder), kv_cache_memory="1MiB", max_model_len=200)
    output = engine.generate(Request("Why?", Amulet([KIND]), greedy_params(500, ignore_eos=True)))
    longest = max(len(ids) for ids in prompt_ids(output))
    assert longest + len(output.token_ids) == 200
    assert output.finish_reason == "length"


def test_an_end_of_text_token_ends_the_answer_and_is_not_in_its_text(tiny: Engine) -> None:
    for field in ({}, {"skip_special_tokens": False}, {"include_stop_str_in_output": True}):
        output = tiny.generate(Request(QUESTION, sampling=greedy_params(logit_bias={EOS: 1e4}, **field)))
        assert (output.token_ids, output.text, output.finish_reason) == ([EOS], "", "stop")


def test_end_of_text_can_be_ignored(tiny: Engine) -> None:
    output = tiny.generate(
        Request(QUESTION, sampling=greedy_params(6, logit_bias={EOS: 1e4}, ignore_eos=True))
    )
    assert (output.token_ids, output.finish_reason) == ([EOS] * 6, "length")
    unskipped = tiny.generate(
        Request(
            QUESTION,
            sampling=greedy_params(2, logit_bias={EOS: 1e4}, ignore_eos=True, skip_special_tokens=False),
        )
    )
    assert unskipped.text == "<|im_end|>" * 2


def test_no_answer_ends_before_min_tokens(tiny: Engine) -> None:
    plain = tiny.generate(Request(QUESTION, sampling=greedy_params(ignore_eos=True)))
    sampling = greedy_params(min_tokens=5, logit_bias={EOS: 1e4}, stop_token_ids=plain.token_ids[:3])
    output = tiny.generate(Request(QUESTION, sampling=sampling))
    assert len(output.token_ids) == 6
    assert output.token_ids[-1] == EOS
    assert not {EOS, *plain.token_ids[:3]} & set(output.token_ids[:5])


def test_stop_token_ids_end_the_answer_before_their_text(tiny: Engine) -> None:
    plain = tiny.generate(Request(QUESTION, sampling=greedy_params(ignore_eos=True)))
    stop = plain.token_ids[4]
    first = plain.token_ids.index(stop)
    output = tiny.generate(Request(QUESTION, sampling=greedy_params(stop_token_ids=(stop,), ignore_eos=True)))
    assert output.token_ids == plain.token_ids[: first + 1]
    assert output.text == tiny.tokenizer.decode(output.token_ids[:-1])
    assert output.finish_reason == "stop"


FORCED_TEXT = "one two STOP three"


def generate_forced_text(engine: Engine, text: str, **fields: Any) -> Output:
    """Output of a model forced to generate exactly `text`; every token is one byte."""
    ids = [id_ for character in text for id_ in engine.tokenizer.encode(character)]
    request = Request("Say it.", sampling=SamplingParams(max_tokens=len(ids), **fields))
    forced_ids = iter(ids)
    head: Any = get_runner(engine).model.lm_head
    original_matmul = head._linear

    def force_next_token(hidden: torch.Tensor) -> torch.Tensor:
        logits = original_matmul(hidden)
        logits[:, next(forced_ids)] = 1e4
        return logits

    head._linear = force_next_token
    try:
        return engine.generate(request)
    finally:
        head._linear = original_matmul


@pytest.mark.parametrize(
    ("stop", "include", "text", "tokens"),
    [
        (("STOP",), False, "one two ", 12),
        (("STOP",), True, "one two STOP", 12),
        (("o S", "STOP"), False, "one tw", 9),
        (("wo ST", "o S"), False, "one t", 10),
        (("never",), False, FORCED_TEXT, len(FORCED_TEXT)),
        (("threes",), False, FORCED_TEXT, len(FORCED_TEXT)),
        (("e",), False, "on", 3),
        (("e",), True, "one", 3),
        ((FORCED_TEXT,), False, "", len(FORCED_TEXT)),
    ],
)
def test_an_answer_ends_at_a_stop_string_that_spans_tokens(
    stop: tuple[str, ...], include: bool, text: str, tokens: int, tiny: Engine
) -> None:
    output = generate_forced_text(tiny, FORCED_TEXT, stop=stop, include_stop_str_in_output=include)
    assert (output.text, len(output.token_ids)) == (text, tokens)
    assert output.finish_reason == ("length" if text == FORCED_TEXT else "stop")


def test_a_stop_string_matched_at_the_end_of_the_answer_has_reason_stop(tiny: Engine) -> None:
    """After "abc", "abcd" may still complete: only the end of the answer decides for "bc"."""
    output = generate_forced_text(tiny, "abc", stop=("abcd", "bc"))
    assert (output.text, output.finish_reason) == ("a", "stop")


def test_stop_strings_within_min_tokens_are_ignored(tiny: Engine) -> None:
    output = generate_forced_text(tiny, "aXbXc", stop=("X",), min_tokens=3)
    assert (output.text, output.finish_reason, len(output.token_ids)) == ("aXb", "stop", 4)
