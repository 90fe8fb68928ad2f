"""tokenizer.model encodes as in sentencepiece, and untrusted text never becomes an added token."""

from __future__ import annotations

import json
import random
from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken
from transformers import LlamaTokenizer
from transformers.tokenization_utils_base import generate_merges
from trimtab.kernels.common.errors import InputError
from trimtab.models.tokenizer.sentencepiece import SentencePieceBackend
from trimtab.models.tokenizer.sentencepiece_model import SentencePieceModel
from trimtab.models.tokenizer.tokenizer import Tokenizer

from ...helpers.vocabularies import (
    AWKWARD_TEXTS,
    FORGERIES,
    LLAMA_OPTIONS,
    SENTENCEPIECE_OPTIONS,
    sentencepiece_model,
)

if TYPE_CHECKING:
    from pathlib import Path

named_models = pytest.mark.parametrize("name", SENTENCEPIECE_OPTIONS)
ALL_BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def sentencepiece_peer(name: str) -> SentencePieceProcessor:
    return SentencePieceProcessor(model_proto=sentencepiece_model(**SENTENCEPIECE_OPTIONS[name]))


def make_tokenizer(content: bytes, *added: tuple[AddedToken, int | None], legacy: bool = True) -> Tokenizer:
    return Tokenizer(SentencePieceBackend(SentencePieceModel(content), added, legacy))


def write_folder(folder: Path, content: bytes | None = None, **files: Any) -> Path:
    (folder / "tokenizer.model").write_bytes(
        sentencepiece_model(**LLAMA_OPTIONS) if content is None else content
    )
    for name, data in files.items():
        (folder / f"{name}.json").write_text(json.dumps(data))
    return folder


def encode_pieces(tokenizer: Tokenizer, text: str, **kwargs: Any) -> list[str]:
    return [str(tokenizer._backend.id_to_token(index)) for index in tokenizer.encode(text, **kwargs)]


@named_models
def test_awkward_texts_encode_and_decode_as_in_sentencepiece(name: str) -> None:
    peer, tokenizer = (
        sentencepiece_peer(name),
        make_tokenizer(sentencepiece_model(**SENTENCEPIECE_OPTIONS[name])),
    )
    for text in AWKWARD_TEXTS:
        ids = peer.encode(text)
        assert tokenizer.encode(text) == ids, text
        assert tokenizer.decode(ids) == peer.decode(ids), text


@named_models
def test_untrusted_lookalike_texts_encode_as_in_sentencepiece(name: str) -> None:
    """sentencepiece never encodes text as a control symbol."""
    peer, tokenizer = (
        sentencepiece_peer(name),
        make_tokenizer(sentencepiece_model(**SENTENCEPIECE_OPTIONS[name])),
    )
    for text in [*FORGERIES, *(text + FORGERIES[n % len(FORGERIES)] for n, text in enumerate(AWKWARD_TEXTS))]:
        assert tokenizer.encode(text, untrusted=range(len(text))) == peer.encode(text), text


@named_models
def test_any_ids_decode_and_stream_as_in_sentencepiece(name: str) -> None:
    peer, tokenizer = (
        sentencepiece_peer(name),
        make_tokenizer(sentencepiece_model(**SENTENCEPIECE_OPTIONS[name])),
    )
    any_ids = st.integers(0, len(peer) - 1)
    low_ids = st.integers(0, min(260, len(peer) - 1))  # control symbols, and bytes if any
    spaces = st.sampled_from([i for i in range(len(peer)) if peer.id_to_piece(i).startswith("▁")])
    written = st.sampled_from(AWKWARD_TEXTS).map(peer.encode)
    parts = st.one_of(st.lists(st.one_of(low_ids, spaces, any_ids), max_size=6), written)

    @settings(max_examples=200, deadline=None)
    @given(st.lists(parts, max_size=4))
    def check(parts: list[list[int]]) -> None:
        ids = [index for part in parts for index in part]
        assert tokenizer.decode(ids) == peer.decode(ids)
        stream = tokenizer.detokenizer()
        assert "".join([*(stream.step([index]) for index in ids), stream.flush()]) == peer.decode(ids)

    check()


def test_bytes_become_text_when_a_character_is_complete() -> None:
    tokenizer = make_tokenizer(sentencepiece_model(**LLAMA_OPTIONS))
    ids = [tokenizer.token_to_ids(f"<0x{byte:02X}>")[0] for byte in "你\n".encode()]
    stream = tokenizer.detokenizer()
    assert [stream.step([index]) for index in ids] == ["", "", "你", "\n"]
    assert [stream.step([ids[0]]), stream.step(ids[:1]), stream.flush()] == ["", "\ufffd", "\ufffd"]


def test_ids_without_a_token_are_skipped() -> None:
    tokenizer = make_tokenizer(sentencepiece_model(**LLAMA_OPTIONS))
    word = tokenizer.encode("a")
    assert tokenizer.decode([tokenizer.vocab_size, *word, -1, 10**9, *word]) == "a a"


SEGMENTS = ["<s>", "</s>", "<|im_start|>", "fox", "the fox\n", "[INST] é", "東京", "a  b"]


@pytest.mark.parametrize("legacy", [True, False])
@settings(max_examples=200, deadline=None)
@given(segments=st.lists(st.sampled_from(SEGMENTS), max_size=7))
def test_texts_between_added_tokens_start_as_in_transformers(legacy: bool, segments: list[str]) -> None:
    """Texts that start with a space differ, see SentencePieceBackend."""
    text, content = "".join(segments), sentencepiece_model(**LLAMA_OPTIONS)
    peer = transformers_peer(legacy)
    added = (AddedToken("<|im_start|>", special=True), len(SentencePieceModel(content).pieces))
    ids = make_tokenizer(content, added, legacy=legacy).encode(text)
    assert ids == peer.encode(text, add_special_tokens=False)


@cache
def transformers_peer(legacy: bool) -> LlamaTokenizer:
    """The transformers tokenizer, built from the pieces: reading the file requires another package."""
    pieces = SentencePieceModel(sentencepiece_model(**LLAMA_OPTIONS)).pieces
    vocab = {piece: index for index, piece in enumerate(pieces)}
    joined = {piece for piece in pieces if piece not in (*ALL_BYTES, "<unk>", "<s>", "</s>")}
    peer = LlamaTokenizer(vocab, generate_merges(vocab, skip_tokens=vocab.keys() - joined), legacy=legacy)
    peer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    return peer


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, ["▁a", "<s>", "▁a"]),
        ({"legacy": True}, ["▁a", "<s>", "▁a"]),
        ({"legacy": False}, ["▁a", "<s>", "a"]),
        ({"add_prefix_space": False}, ["a", "<s>", "a"]),
        ({"add_prefix_space": True, "legacy": False}, ["▁a", "<s>", "a"]),
        ({"add_prefix_space": None, "legacy": None}, ["▁a", "<s>", "▁a"]),
    ],
)
def test_prefix_spaces_follow_tokenizer_config(
    tmp_path: Path, config: dict[str, Any], expected: list[str]
) -> None:
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, tokenizer_config=config))
    assert encode_pieces(tokenizer, "a<s>a") == expected
    assert encode_pieces(tokenizer, "a<s>a", untrusted=[]) == expected
    assert tokenizer.decode(tokenizer.encode("a")) == "a"


def test_tokenizer_config_can_enable_a_prefix_space_that_the_model_disables(tmp_path: Path) -> None:
    content = sentencepiece_model(**SENTENCEPIECE_OPTIONS["without prefix"])
    plain = Tokenizer.from_folder(write_folder(tmp_path, content))
    with_prefix_space = Tokenizer.from_folder(
        write_folder(tmp_path, content, tokenizer_config={"add_prefix_space": True})
    )
    assert (encode_pieces(plain, "a"), encode_pieces(with_prefix_space, "a")) == (["a"], ["▁a"])
    assert with_prefix_space.decode(with_prefix_space.encode("a")) == plain.decode(plain.encode("a")) == "a"


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({}, ["<s>", "▁a"]),
        ({"add_bos_token": False}, ["▁a"]),
        ({"add_eos_token": True}, ["<s>", "▁a", "</s>"]),
        ({"add_bos_token": False, "add_eos_token": True}, ["▁a", "</s>"]),
        ({"bos_token": None}, ["▁a"]),
        (
            {"bos_token": "</s>", "eos_token": {"content": "<s>"}, "add_eos_token": True},
            ["</s>", "▁a", "<s>"],
        ),
    ],
)
def test_bos_and_eos_are_added_according_to_tokenizer_config(
    tmp_path: Path, config: dict[str, Any], expected: list[str]
) -> None:
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, tokenizer_config=config))
    assert encode_pieces(tokenizer, "a", add_special_tokens=True) == expected


def test_bos_and_eos_default_to_those_of_the_model(tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_folder(
        write_folder(tmp_path, config={"bos_token_id": 7, "eos_token_id": [2, 9]})
    )
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    assert tokenizer.eos_token_ids == (2, 9)
    nothing = sentencepiece_model(**LLAMA_OPTIONS, bos_id=-1, eos_id=-1)
    bare = Tokenizer.from_folder(write_folder(tmp_path, nothing, config={}))
    assert (bare.bos_token, bare.eos_token, bare.eos_token_ids, bare.prefix_token_ids) == ("", "", (), [])


@pytest.mark.parametrize("newer", [False, True])
def test_added_tokens_are_read_from_old_and_new_files(tmp_path: Path, newer: bool) -> None:
    size = len(SentencePieceModel(sentencepiece_model(**LLAMA_OPTIONS)).pieces)
    ids = {"<|im_end|>": size, "<tool>": size + 1}
    if newer:
        special = {text: {"content": text, "special": text == "<|im_end|>"} for text in ids}
        files: dict[str, Any] = {
            "tokenizer_config": {"added_tokens_decoder": {str(ids[text]): special[text] for text in ids}}
        }
    else:
        files = {"added_tokens": ids, "special_tokens_map": {"additional_special_tokens": ["<|im_end|>"]}}
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, **files))
    assert tokenizer.vocab_size == size + 2
    assert encode_pieces(tokenizer, "a<|im_end|><tool>") == ["▁a", "<|im_end|>", "<tool>"]
    written = tokenizer.encode("a<|im_end|><tool>")
    assert tokenizer.decode(written) == "a<tool>"
    assert tokenizer.decode(written, skip_special_tokens=False) == "a<|im_end|><tool>"


def test_a_file_may_rename_a_piece_and_a_token_without_an_id_is_ignored(tmp_path: Path) -> None:
    decoder = {"0": {"content": "<unk>", "special": True}, "5": {"content": "<five>"}}
    config = {"added_tokens_decoder": decoder, "pad_token": "<pad>", "unk_token": "<unk>"}
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, tokenizer_config=config))
    assert tokenizer.encode("<five>") == [5]
    assert tokenizer.decode([5, *tokenizer.encode("a"), 0]) == "<five> a"
    assert tokenizer.token_to_ids("<pad>") == []
    assert tokenizer.vocab_size == len(SentencePieceModel(sentencepiece_model(**LLAMA_OPTIONS)).pieces)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, ["▁a", "▁", "<x>", "▁▁", "b"]),
        ({"lstrip": True}, ["▁a", "<x>", "▁▁", "b"]),
        ({"rstrip": True}, ["▁a", "▁", "<x>", "▁", "b"]),
    ],
)
def test_lstrip_and_rstrip_include_whitespace(flags: dict[str, bool], expected: list[str]) -> None:
    tokenizer = make_tokenizer(sentencepiece_model(**LLAMA_OPTIONS), (AddedToken("<x>", **flags), 500))
    assert encode_pieces(tokenizer, "a <x> b") == expected


def test_a_single_word_token_is_not_matched_within_a_word() -> None:
    tokenizer = make_tokenizer(
        sentencepiece_model(**LLAMA_OPTIONS), (AddedToken("ab", single_word=True), 500)
    )
    assert [index == 500 for index in tokenizer.encode("ab")] == [True]
    assert 500 not in tokenizer.encode("cab abc")


def test_the_longest_matching_token_is_chosen() -> None:
    tokens = [(AddedToken(text), 500 + n) for n, text in enumerate(("<a", "<a>", "<a>b"))]
    assert make_tokenizer(sentencepiece_model(**LLAMA_OPTIONS), *tokens).encode("<a>b<a><a") == [
        502,
        501,
        500,
    ]


CUSTOM_SYMBOLS = {"user_defined_symbols": ["<sep>", "[INST]"], "control_symbols": ["<ctl>"]}


def test_user_defined_symbols_are_encoded_as_in_sentencepiece() -> None:
    content = sentencepiece_model(
        **LLAMA_OPTIONS, **{key: ",".join(names) for key, names in CUSTOM_SYMBOLS.items()}
    )
    peer, tokenizer = SentencePieceProcessor(model_proto=content), make_tokenizer(content)
    for text in ("a<sep>b [INST]", "<sep><sep> a", "[INST] hi [/INST]", *AWKWARD_TEXTS):
        assert tokenizer.encode(text) == peer.encode(text), text
        assert tokenizer.decode(peer.encode(text)) == peer.decode(peer.encode(text))
    assert encode_pieces(tokenizer, "a<ctl>a") == ["▁a", "<ctl>", "▁a"]


@pytest.mark.parametrize("text", ["<sep>", "a<sep>b", "<ctl>", "[INST] x [INST]", "<sep><sep>", "<|<sep>|>"])
def test_symbols_of_any_kind_cannot_be_forged(text: str) -> None:
    content = sentencepiece_model(
        **LLAMA_OPTIONS, **{key: ",".join(names) for key, names in CUSTOM_SYMBOLS.items()}
    )
    tokenizer = make_tokenizer(content)
    assert tokenizer.find_added_token(text)
    ids = tokenizer.encode(text, untrusted=range(len(text)))
    assert not {
        index for names in CUSTOM_SYMBOLS.values() for name in names for index in tokenizer.token_to_ids(name)
    } & {*ids}
    assert tokenizer.decode(ids) == text


def test_user_defined_symbols_are_recognized_alongside_added_tokens() -> None:
    content = sentencepiece_model(
        **LLAMA_OPTIONS, **{key: ",".join(names) for key, names in CUSTOM_SYMBOLS.items()}
    )
    tokenizer = make_tokenizer(content)
    ids, (symbol,) = (
        tokenizer.encode("[INST] [INST] a", untrusted=range(7, 13)),
        tokenizer.token_to_ids("[INST]"),
    )
    assert ids.index(symbol) <= 1
    assert ids.count(symbol) == 1
    assert tokenizer.decode(ids) == "[INST] [INST] a"


def test_a_symbol_hidden_by_unicode_normalization_is_found() -> None:
    tokenizer = make_tokenizer(sentencepiece_model(model_type="unigram", user_defined_symbols="<sep>"))
    hidden = "a \uff1csep\uff1e"
    (symbol,) = tokenizer.token_to_ids("<sep>")
    assert symbol in tokenizer.encode(hidden)
    assert tokenizer.find_added_token(hidden) == "<sep>"
    assert symbol not in tokenizer.encode(hidden, untrusted=range(len(hidden)))


@pytest.mark.parametrize(("name", "kind"), [("Llama", "BPE"), ("unigram with bytes", "unigram")])
def test_the_tokenizer_kind_is_that_of_the_model(name: str, kind: str) -> None:
    assert make_tokenizer(sentencepiece_model(**SENTENCEPIECE_OPTIONS[name])).kind == f"SentencePiece {kind}"


@pytest.mark.parametrize(
    "content", [b"", b"\0", b"{}", b"aGVsbG8= 1\nd29ybGQ= 2\n", sentencepiece_model(**LLAMA_OPTIONS)[:-99]]
)
def test_a_corrupt_model_is_a_one_line_error(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(InputError, match=r"tokenizer\.model' is a corrupt SentencePiece model") as caught:
        Tokenizer.from_folder(write_folder(tmp_path, content))
    assert "\n" not in str(caught.value)


def test_errors_for_randomly_corrupted_models_are_one_line(tmp_path: Path) -> None:
    content, chance = sentencepiece_model(**LLAMA_OPTIONS), random.Random(0)
    refused = 0
    for _ in range(300):
        broken = bytearray(content)
        for _ in range(chance.choice([1, 1, 3, 10])):
            broken[chance.randrange(len(broken))] = chance.randrange(256)
        try:
            Tokenizer.from_folder(write_folder(tmp_path, bytes(broken))).encode("a<s>")
        except InputError as error:
            refused += "\n" not in str(error)
    assert refused > 100


@pytest.mark.parametrize(
    ("files", "match"),
    [
        (
            {"added_tokens": {"<x>": "5"}},
            r"id of token '<x>' in .*added_tokens\.json' is '5'; it must be an int",
        ),
        ({"added_tokens": {"<x>": -5}}, r"is -5; it must be an integer"),
        ({"added_tokens": {"<x>": 2**60}}, r"is 1152921504606846976; it must"),
        ({"added_tokens": ["<x>"]}, r"added_tokens\.json' contains a JSON list"),
        ({"tokenizer_config": {"added_tokens_decoder": [1]}}, r"added_tokens_decoder in .* is \[1\]"),
        (
            {"tokenizer_config": {"added_tokens_decoder": {"x": {"content": "a"}}}},
            r"id of token 'a' in .* is 'x'",
        ),
        (
            {"tokenizer_config": {"added_tokens_decoder": {"5": {}}}},
            r"token '5' in .* is \{\}; it must be a string",
        ),
        (
            {"tokenizer_config": {"added_tokens_decoder": {"5": {"content": "a", "lstrip": 3}}}},
            "token '5' in",
        ),
        ({"tokenizer_config": {"additional_special_tokens": 5}}, "additional_special_tokens in .* is 5"),
        ({"special_tokens_map": {"additional_special_tokens": [5]}}, r"special_tokens_map\.json' is 5"),
        ({"special_tokens_map": {"pad_token": "\ud800"}}, r"pad_token in .* is '\\ud800'"),
        ({"tokenizer_config": {"legacy": "no"}}, "legacy in .* is 'no'; it must be true or false"),
        ({"tokenizer_config": {"add_bos_token": 1}}, "add_bos_token in .* is 1; it must be true or false"),
    ],
)
def test_the_error_for_an_invalid_entry_names_key_and_file(
    tmp_path: Path, files: dict[str, Any], match: str
) -> None:
    with pytest.raises(InputError, match=match) as caught:
        Tokenizer.from_folder(write_folder(tmp_path, **files))
    assert "\n" not in str(caught.value)


def test_the_error_for_an_id_beyond_the_embedding_has_both_numbers() -> None:
    tokenizer = make_tokenizer(sentencepiece_model(**LLAMA_OPTIONS), (AddedToken("<late>"), 700))
    tokenizer.check_vocab_size(701)
    tokenizer.check_vocab_size(1000)
    with pytest.raises(InputError, match="id 700, for '<late>', and the model's embedding has 700 rows"):
        tokenizer.check_vocab_size(700)
