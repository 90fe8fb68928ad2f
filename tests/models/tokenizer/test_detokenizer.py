"""Streamed detokenization equals decoding all tokens at once, for every decoder."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from unicodedata import normalize

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models
from trimtab.models.tokenizer.huggingface import HFTokenizerBackend
from trimtab.models.tokenizer.tokenizer import Tokenizer

from ...helpers.vocabularies import (
    ATOMS,
    CORPUS,
    SPECIAL_TOKENS,
    make_byte_fallback,
    make_byte_level,
    make_llama_decoder,
    make_unigram,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

texts = st.lists(st.one_of(st.sampled_from([*ATOMS, *SPECIAL_TOKENS]), st.text(max_size=4)), max_size=12).map(
    "".join
)
BACKENDS = {"byte-level": make_byte_level(), "byte-fallback": make_byte_fallback(), "unigram": make_unigram()}
VOCABULARIES = {name: HFTokenizerBackend(backend) for name, backend in BACKENDS.items()}
TRAINED = {name: Tokenizer(vocabulary, "<s>", "</s>") for name, vocabulary in VOCABULARIES.items()}
trained = pytest.mark.parametrize("tokenizer", TRAINED.values(), ids=TRAINED)

OTHER_DECODERS: dict[str, Callable[[], Any]] = {
    "none": lambda: None,
    "metaspace": decoders.Metaspace,
    "word-piece": decoders.WordPiece,
    "gemma": lambda: decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    ),
    "nested byte-level": lambda: decoders.Sequence([decoders.ByteLevel()]),
    "byte-level and replace": lambda: decoders.Sequence([decoders.ByteLevel(), decoders.Replace("a", "b")]),
    "end of word": lambda: decoders.BPEDecoder("▁"),
    "ctc": lambda: decoders.CTC("a", "▁"),
    "two stripped at the start": lambda: decoders.Sequence(
        [decoders.Metaspace(), decoders.Fuse(), decoders.Strip("e", 2, 0)]
    ),
    "rewritten across tokens": lambda: decoders.Sequence(
        [make_llama_decoder(), decoders.Replace(" f", "ph")]
    ),
    "the anchor stripped": lambda: decoders.Sequence([make_llama_decoder(), decoders.Strip("a", 3, 0)]),
}


def id_lists(tokenizer: Tokenizer) -> st.SearchStrategy[list[int]]:
    """Ids that no encoder produces: lone bytes, broken runs, special and unknown ids."""
    any_ids = st.integers(0, tokenizer.vocab_size + 2)
    byte_ids = st.integers(0, 256)  # in the byte-fallback vocabularies these are the bytes
    specials = st.integers(tokenizer.vocab_size - 4, tokenizer.vocab_size - 1)
    encoded = texts.map(tokenizer.encode)
    pieces = st.one_of(
        st.lists(any_ids, max_size=4), st.lists(byte_ids, max_size=5), st.lists(specials, max_size=1), encoded
    )
    return st.lists(pieces, max_size=8).map(lambda parts: [i for part in parts for i in part])


def random_steps(data: st.DataObject, ids: list[int]) -> Iterator[list[int]]:
    while ids:
        size = data.draw(st.sampled_from([1, 1, 1, 2, 5]))
        yield ids[:size]
        ids = ids[size:]


def stream_text(tokenizer: Tokenizer, steps: Iterator[list[int]], skip: bool = True) -> list[str]:
    detokenizer = tokenizer.detokenizer(skip)
    return [*map(detokenizer.step, steps), detokenizer.flush()]


def assert_streams_any_ids(tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids, skip = data.draw(id_lists(tokenizer)), data.draw(st.booleans())
    assert "".join(stream_text(tokenizer, random_steps(data, ids), skip)) == tokenizer.decode(ids, skip)


@trained
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_streamed_text_of_any_ids_is_their_decoded_text(tokenizer: Tokenizer, data: st.DataObject) -> None:
    assert_streams_any_ids(tokenizer, data)


@pytest.mark.parametrize("name", OTHER_DECODERS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_streamed_text_is_the_decoded_text_for_any_decoder(name: str, data: st.DataObject) -> None:
    backend = Backend.from_str(BACKENDS["byte-fallback"].to_str())
    backend.decoder = OTHER_DECODERS[name]()
    assert_streams_any_ids(Tokenizer(HFTokenizerBackend(backend)), data)


@pytest.mark.parametrize(
    ("step", "tokens", "expected"),
    [
        (decoders.Strip("-", 0, 2), ["the", "-", "-", "-"], "the-"),
        (decoders.Strip("-", 2, 0), ["-", "-", "-", "the"], "-the"),
        (decoders.Replace("--", "+"), ["the", "-", "-", "the"], "the+the"),
    ],
)
def test_decoder_steps_after_fuse_apply_to_the_streamed_text(
    step: Any, tokens: list[str], expected: str
) -> None:
    backend = Backend(models.WordLevel({"the": 0, "-": 1}, unk_token="-"))
    backend.decoder = decoders.Sequence([decoders.Fuse(), step])
    tokenizer = Tokenizer(HFTokenizerBackend(backend))
    ids = [backend.token_to_id(token) for token in tokens]
    assert tokenizer.decode(ids) == expected
    assert "".join(stream_text(tokenizer, iter([[i] for i in ids]))) == expected


@settings(max_examples=150, deadline=None)
@given(text=texts)
def test_byte_level_detokenizer_buffers_nothing_at_the_end_of_a_text(text: str) -> None:
    tokenizer = TRAINED["byte-level"]
    detokenizer = tokenizer.detokenizer(skip_special_tokens=False)
    assert "".join(detokenizer.step([i]) for i in tokenizer.encode(text)) == normalize("NFC", text)
    assert detokenizer.flush() == ""


@pytest.mark.parametrize("name", ["byte-fallback", "unigram"])
def test_a_byte_run_is_buffered_until_it_ends_and_earlier_text_is_not(name: str) -> None:
    tokenizer = TRAINED[name]
    run = BACKENDS[name].encode("x\u1234\u1234y", add_special_tokens=False)
    detokenizer = tokenizer.detokenizer()
    pieces = dict(zip(range(len(run.ids)), (detokenizer.step([i]) for i in run.ids), strict=True))
    assert [pieces[i] for i, token in enumerate(run.tokens) if token.startswith("<0x")] == [""] * 6
    assert [piece for piece in pieces.values() if piece] == ["x", "\u1234\u1234y"]


def test_pending_text_is_empty_while_a_character_is_incomplete() -> None:
    detokenizer, newline = TRAINED["byte-fallback"].detokenizer(), 1 + 0x0A
    steps = [
        (detokenizer.step([index]), detokenizer.pending) for index in (newline, 1 + 0xC3, 1 + 0xA9, newline)
    ]
    assert steps == [("", "\n"), ("", ""), ("", "\né"), ("", "\né\n")]
    assert detokenizer.step(TRAINED["byte-fallback"].encode("fox")) == "\né\n fox"
    assert detokenizer.pending == ""
    detokenizer = TRAINED["byte-level"].detokenizer()
    assert (detokenizer.step(TRAINED["byte-level"].encode("\U0010ffff")[:2]), detokenizer.pending) == ("", "")


def test_an_invalid_byte_turns_its_run_into_replacement_characters() -> None:
    tokenizer = TRAINED["byte-fallback"]
    ids = [1 + 0xE4, 1 + 0xBD, 1 + 0xA0, 1 + 0xFF]
    detokenizer = tokenizer.detokenizer()
    assert [detokenizer.step([i]) for i in ids] == [""] * 4
    assert detokenizer.flush() == "\ufffd" * 4


def test_a_skipped_special_token_inside_a_byte_run_does_not_end_it() -> None:
    tokenizer = TRAINED["byte-fallback"]
    (eos,) = tokenizer.eos_token_ids
    detokenizer = tokenizer.detokenizer()
    assert detokenizer.step([1 + 0xC3, eos]) == ""
    assert detokenizer.step([1 + 0xA9, *tokenizer.encode("fox")]) == "é fox"


def test_an_incomplete_character_at_the_end_is_a_replacement_character() -> None:
    tokenizer = TRAINED["byte-level"]
    detokenizer = tokenizer.detokenizer()
    assert detokenizer.step(tokenizer.encode("\U0010ffff")[:2]) == ""
    assert detokenizer.flush() == "\ufffd"


@pytest.mark.parametrize("name", ["byte-fallback", "unigram"])
@pytest.mark.parametrize("text", ["the fox " * 200, "\u1234" * 400, "\n" * 500])
def test_each_token_is_decoded_once(name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, decoded = TRAINED[name], 0
    ids = tokenizer.encode(text)
    join = VOCABULARIES[name].decode_tokens

    def counting(tokens: list[str]) -> str:
        nonlocal decoded
        decoded += len(tokens)
        return join(tokens)

    monkeypatch.setattr(VOCABULARIES[name], "decode_tokens", counting)
    assert "".join(stream_text(tokenizer, iter([[i] for i in ids]))) == tokenizer.decode(ids)
    assert decoded <= 2 * len(ids) + 10  # each decode adds an anchor token


@pytest.mark.parametrize("name", VOCABULARIES)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_decode_joins_the_vocabulary_entries_of_the_ids(name: str, data: st.DataObject) -> None:
    vocabulary, ids = VOCABULARIES[name], data.draw(id_lists(TRAINED[name]))
    skip = data.draw(st.booleans())
    assert vocabulary.decode_tokens(vocabulary.ids_to_tokens(ids, skip)) == vocabulary.decode(ids, skip)


def test_the_demo_tokenizer_streams_what_it_decodes(demo_folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(demo_folder)
    text = "".join([*ATOMS, *SPECIAL_TOKENS, *CORPUS[:6]])
    ids = tokenizer.encode(text)
    assert "".join(stream_text(tokenizer, iter([[i] for i in ids]))) == tokenizer.decode(ids)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert (tokenizer.eos_token_ids, tokenizer.vocab_size) == ((2,), 49152)
