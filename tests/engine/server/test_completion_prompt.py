"""The ids of a completion's prompt: one BOS, at the beginning, whoever wrote it."""

from __future__ import annotations

import pytest
from tokenizers.processors import TemplateProcessing
from trimtab.engine.server.requests import encode_completion_prompt
from trimtab.models.tokenizer.huggingface import HFTokenizerBackend
from trimtab.models.tokenizer.tokenizer import Tokenizer

from ...helpers.tiny_model import train_tokenizer

BOS = "<|im_start|>"


def make_tokenizer(*, adds_bos: bool) -> Tokenizer:
    backend = train_tokenizer()
    if adds_bos:
        backend.post_processor = TemplateProcessing(
            single=f"{BOS} $A", special_tokens=[(BOS, backend.token_to_id(BOS))]
        )
    return Tokenizer(HFTokenizerBackend(backend), BOS, "<|im_end|>")


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("objective", [None, "Be kind."])
def test_a_rendered_prompt_has_one_bos_at_its_beginning(adds_bos: bool, objective: str | None) -> None:
    tokenizer = make_tokenizer(adds_bos=adds_bos)
    (bos,) = tokenizer.token_to_ids(BOS)
    ids = encode_completion_prompt(tokenizer, objective, f"{BOS}user: Why?")
    assert ids.count(bos) == 1
    assert ids[0] == bos
    expected = "user: Why?" if objective is None else "Be kind.\n\nuser: Why?"
    assert tokenizer.decode(ids[1:], skip_special_tokens=False) == expected


@pytest.mark.parametrize("adds_bos", [True, False])
def test_a_prompt_without_bos_gets_what_the_tokenizer_adds(adds_bos: bool) -> None:
    tokenizer = make_tokenizer(adds_bos=adds_bos)
    (bos,) = tokenizer.token_to_ids(BOS)
    assert encode_completion_prompt(tokenizer, None, "Why?").count(bos) == int(adds_bos)
    assert encode_completion_prompt(tokenizer, None, f"Why {BOS}").count(bos) == 1 + int(adds_bos)
    assert encode_completion_prompt(tokenizer, None, BOS) == [bos]
