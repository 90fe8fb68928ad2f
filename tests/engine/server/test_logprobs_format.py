"""Log-probabilities in the OpenAI format: tokens that are parts of characters, and tokens with one text."""

from __future__ import annotations

from typing import Any

import pytest
from trimtab.engine.outputs import Delta, TokenLogprobs
from trimtab.engine.server.responses import ResponseBuilder
from trimtab.models.tokenizer.huggingface import HFTokenizerBackend
from trimtab.models.tokenizer.tokenizer import Tokenizer

from ...helpers.tiny_model import train_tokenizer

TOKENS = {
    1: b"a",
    2: "é".encode()[:1],
    3: "é".encode()[1:],
    4: "日".encode()[:1],
    5: "日".encode()[1:],
    6: b" b",
    7: b"a",  # another token with the text of 1
    8: b"\xff",
}
STEPS = [
    TokenLogprobs(1, -0.1, {7: -0.05, 1: -0.1, 8: -3.0}),
    TokenLogprobs(2, -0.2, {2: -0.2, 4: -1.0, 8: -2.0}),
    TokenLogprobs(3, -0.3, {3: -0.3, 5: -1.0, 2: -2.0}),
    TokenLogprobs(4, -0.4, {4: -0.4, 2: -0.5, 8: -0.6}),
    TokenLogprobs(5, -0.5, {5: -0.5, 3: -0.7, 1: -0.9}),
    TokenLogprobs(6, -0.6, {6: -0.6, 1: -0.7, 7: -0.8}),
]


def logprobs(*, chat: bool) -> Any:
    builder = ResponseBuilder("id", 0, "model", chat, TOKENS.__getitem__)
    pieces = []
    for step in STEPS:  # one chunk for each token
        chunk = builder.delta_chunk(0, Delta(0, "", [step.token_id], logprobs=[step]))
        assert chunk is not None
        pieces.append(chunk["choices"][0]["logprobs"])
    if chat:
        return [entry for piece in pieces for entry in piece["content"]]
    return {name: [value for piece in pieces for value in piece[name]] for name in pieces[0]}


def test_completions_have_as_many_entries_as_asked_each_with_its_own_value() -> None:
    result = logprobs(chat=False)
    assert result["tokens"] == ["a", r"bytes:\xc3", r"bytes:\xa9", r"bytes:\xe6", r"bytes:\x97\xa5", " b"]
    assert [len(top) for top in result["top_logprobs"]] == [3] * len(STEPS)
    for token, logprob, top in zip(
        result["tokens"], result["token_logprobs"], result["top_logprobs"], strict=True
    ):
        assert top[token] == logprob
    assert result["top_logprobs"][0] == {"token_id:7": -0.05, "a": -0.1, r"bytes:\xff": -3.0}


def test_text_offset_is_the_character_in_which_a_token_begins() -> None:
    assert logprobs(chat=False)["text_offset"] == [0, 1, 1, 2, 2, 3]
    assert "aé日 b"[3:] == " b"


def test_the_bytes_of_a_chat_joined_are_its_text() -> None:
    entries = logprobs(chat=True)
    assert b"".join(bytes(entry["bytes"]) for entry in entries).decode() == "aé日 b"
    assert all(isinstance(top["bytes"], list) for entry in entries for top in entry["top_logprobs"])


def test_the_bytes_of_a_texts_tokens_joined_are_the_text() -> None:
    tokenizer = Tokenizer(HFTokenizerBackend(train_tokenizer()))
    text = "naïve 東京 👩‍👩‍👧‍👦<|im_end|> x"
    ids = tokenizer.encode(text)
    assert b"".join(map(tokenizer.token_bytes, ids)).decode() == text
    assert tokenizer.token_bytes(10_000) == b""


@pytest.mark.parametrize("chat", [False, True])
def test_choices_are_counted_apart(chat: bool) -> None:
    builder = ResponseBuilder("id", 0, "model", chat, TOKENS.__getitem__)
    for index in (0, 1):
        chunk = builder.delta_chunk(index, Delta(index, "a", [1], logprobs=[STEPS[0]]))
        assert chunk is not None
        if not chat:
            assert chunk["choices"][0]["logprobs"]["text_offset"] == [0]
