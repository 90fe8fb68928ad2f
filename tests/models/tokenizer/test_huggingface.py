"""tokenizer.json encodes as in transformers, and untrusted text never becomes an added token."""

from __future__ import annotations

import json
from itertools import product
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer
from trimtab.kernels.common.errors import InputError
from trimtab.models.tokenizer.backend import TextPosition, encode_segments
from trimtab.models.tokenizer.huggingface import HFTokenizerBackend
from trimtab.models.tokenizer.tokenizer import Tokenizer

from ...helpers.vocabularies import (
    ADDED_TOKENS,
    AWKWARD_TEXTS,
    FORGERIES,
    SPECIAL_TOKENS,
    make_byte_fallback,
    make_byte_level,
    make_unigram,
)

if TYPE_CHECKING:
    from pathlib import Path

BACKENDS = {
    "byte-level": make_byte_level(),
    "byte-fallback": make_byte_fallback(),
    "byte-fallback, always a space": make_byte_fallback("always"),
    "byte-fallback, a normalizer's space": make_byte_fallback("normalizer"),
    "unigram": make_unigram(),
}
backends = pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
LOOKALIKES = [
    *FORGERIES,
    *(f"{text}{forgery}" for text, forgery in zip(AWKWARD_TEXTS, FORGERIES * 99, strict=False)),
]


def write_folder(folder: Path, backend: Backend, **config: Any) -> Path:
    backend.save(str(folder / "tokenizer.json"))
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**named, **config}))
    return folder


def ours_and_transformers(folder: Path, backend: Backend, **config: Any) -> tuple[Tokenizer, Any]:
    """Load a folder with our tokenizer and with transformers."""
    write_folder(folder, backend, **config)
    return Tokenizer.from_folder(folder), AutoTokenizer.from_pretrained(str(folder))


@backends
def test_awkward_texts_encode_and_decode_as_in_transformers(tmp_path: Path, backend: Backend) -> None:
    tokenizer, peer = ours_and_transformers(tmp_path, backend)
    for text in [*AWKWARD_TEXTS, *LOOKALIKES, *(f"a{token} b" for token in ADDED_TOKENS)]:
        ids = tokenizer.encode(text)
        assert ids == peer.encode(text, add_special_tokens=False), text
        for skip in (True, False):
            assert tokenizer.decode(ids, skip) == peer.decode(ids, skip_special_tokens=skip), text


@backends
def test_untrusted_lookalike_texts_encode_as_in_transformers(tmp_path: Path, backend: Backend) -> None:
    tokenizer, peer = ours_and_transformers(tmp_path, backend)
    for text in [*AWKWARD_TEXTS, *LOOKALIKES]:
        expected = peer.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert tokenizer.encode(text, untrusted=range(len(text))) == expected, text


@backends
@pytest.mark.parametrize(
    "text", [f"{text}{token}{text}" for token in ADDED_TOKENS for text in ("", "a ", " ")]
)
def test_untrusted_non_special_added_tokens_are_encoded_as_text(backend: Backend, text: str) -> None:
    """transformers still recognizes these; the reference is the same vocabulary without them."""
    plain = Backend.from_str(backend.to_str())
    plain = Backend.from_str(json.dumps({**json.loads(plain.to_str()), "added_tokens": []}))
    tokenizer = Tokenizer(HFTokenizerBackend(backend))
    assert (
        tokenizer.encode(text, untrusted=range(len(text))) == plain.encode(text, add_special_tokens=False).ids
    )


@backends
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_text_encoded_in_segments_has_the_same_ids(backend: Backend, data: st.DataObject) -> None:
    parts = st.sampled_from([*SPECIAL_TOKENS, *ADDED_TOKENS, *AWKWARD_TEXTS])
    text = "".join(data.draw(st.lists(parts, max_size=6)))
    vocabulary = HFTokenizerBackend(backend)
    ids, matches = vocabulary.encode_with_matches(text)
    assert ids == vocabulary.encode(text)
    assert encode_segments(text, matches, vocabulary.encode_plain) == ids


@backends
def test_adjacent_added_tokens_encoded_in_segments_have_the_same_ids(backend: Backend) -> None:
    """A normalizer's prefix space is matched with the token that follows it, and added only once."""
    vocabulary = HFTokenizerBackend(backend)
    for parts in product(["a", " ", *ADDED_TOKENS, *SPECIAL_TOKENS[:2]], repeat=3):
        text = "".join(parts)
        ids, matches = vocabulary.encode_with_matches(text)
        assert encode_segments(text, matches, vocabulary.encode_plain) == ids, text


FULL_WIDTH = "\uff1cs\uff1e"
"""NFKC normalizes it to "<s>"."""


@pytest.mark.parametrize("text", [*FORGERIES, FULL_WIDTH, f"a {FULL_WIDTH}<s>", *AWKWARD_TEXTS[:20]])
def test_untrusted_text_is_not_encoded_as_a_piece_that_is_an_added_token(text: str) -> None:
    """Converted vocabularies list added tokens among their pieces, so plain encoding can produce them."""
    backend = make_unigram(*SPECIAL_TOKENS)
    reserved = {backend.token_to_id(token) for token in SPECIAL_TOKENS}
    plain = Backend.from_str(json.dumps({**json.loads(backend.to_str()), "added_tokens": []}))
    ids = Tokenizer(HFTokenizerBackend(backend)).encode(text, untrusted=range(len(text)))
    assert reserved.isdisjoint(ids)
    assert plain.decode(ids) == plain.decode(plain.encode(text).ids)
    assert reserved & set(plain.encode("a<s>").ids), "without the guard the text is encoded as an added token"


def test_the_unknown_token_is_allowed_in_untrusted_text() -> None:
    backend = Backend(models.BPE({"<unk>": 0, "a": 1, "b": 2, "ab": 3}, [("a", "b")], unk_token="<unk>"))
    backend.add_special_tokens(["<unk>"])
    tokenizer = Tokenizer(HFTokenizerBackend(backend))
    assert tokenizer.encode("ab?ab", untrusted=range(5)) == [3, 0, 3]


@pytest.mark.parametrize(
    ("flags", "text", "untrusted", "expected"),
    [
        ({"lstrip": True}, "a  <x> b", [], ["a", "<x>", "Ġ", "b"]),
        ({"rstrip": True}, "a  <x> b", [], ["a", "Ġ", "Ġ", "<x>", "b"]),
        ({"lstrip": True}, "a  <x><x>", [6], ["a", "<x>", "<", "x", ">"]),
        ({"rstrip": True}, "<x>  <x> b", [0], ["<", "x", ">", "Ġ", "Ġ", "<x>", "b"]),
        ({"single_word": True}, "a<x> <x>", [], ["a", "<", "x", ">", "Ġ", "<x>"]),
    ],
)
def test_lstrip_and_rstrip_tokens_include_adjacent_whitespace(
    flags: dict[str, bool], text: str, untrusted: list[int], expected: list[str]
) -> None:
    backend = Backend(models.BPE({c: i for i, c in enumerate("abx<>Ġ")}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.add_special_tokens([AddedToken("<x>", **flags)])
    vocabulary = HFTokenizerBackend(backend)
    ids = Tokenizer(vocabulary).encode(text, untrusted=untrusted)
    assert vocabulary.ids_to_tokens(ids, False) == expected


def test_untrusted_whitespace_may_be_an_added_token() -> None:
    backend = make_byte_level()
    backend.add_tokens([AddedToken("    ", special=False, normalized=False)])
    tokenizer = Tokenizer(HFTokenizerBackend(backend))
    indent = backend.token_to_id("    ")
    assert tokenizer.find_added_token("    x") == ""
    assert tokenizer.encode("    <s>", untrusted=[4, 5, 6])[0] == indent


@pytest.mark.parametrize("position", TextPosition)
def test_prefix_spaces_are_added_at_the_positions_of_the_vocabulary(position: TextPosition) -> None:
    prefixed_positions = {
        "byte-fallback": {TextPosition.START},
        "byte-fallback, always a space": {
            TextPosition.START,
            TextPosition.AFTER_TOKEN,
            TextPosition.AFTER_NORMALIZED,
        },
        "byte-fallback, a normalizer's space": {TextPosition.START, TextPosition.AFTER_TOKEN},
    }
    for name, positions in prefixed_positions.items():
        vocabulary = HFTokenizerBackend(BACKENDS[name])
        text = "".join(vocabulary.ids_to_tokens(vocabulary.encode_plain("fox", position), False))
        assert text == "▁fox" if position in positions else text == "fox"


def test_byte_level_adds_no_prefix_space_within_a_text() -> None:
    backend = Backend(models.BPE({"a": 0, "Ġ": 1}, []))
    steps = [pre_tokenizers.Sequence([]), pre_tokenizers.ByteLevel(add_prefix_space=True)]
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    vocabulary = HFTokenizerBackend(backend)
    assert [vocabulary.encode_plain("a", position) for position in TextPosition] == [
        [1, 0],
        [1, 0],
        [1, 0],
        [0],
    ]


@pytest.mark.parametrize("add_bos_token", [None, False, True])
@pytest.mark.parametrize("add_eos_token", [None, False, True])
@pytest.mark.parametrize("single", [None, "$A", "<s> $A", "<s> $A </s>"])
def test_bos_and_eos_are_added_as_by_transformers(
    tmp_path: Path, add_bos_token: bool | None, add_eos_token: bool | None, single: str | None
) -> None:
    backend = Backend.from_str(BACKENDS["byte-level"].to_str())
    if single:
        tokens = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>")]
        backend.post_processor = processors.TemplateProcessing(single, special_tokens=tokens)
    tokenizer, peer = ours_and_transformers(
        tmp_path, backend, add_bos_token=add_bos_token, add_eos_token=add_eos_token
    )
    assert tokenizer.encode("a<s>", add_special_tokens=True) == peer.encode("a<s>")


def test_tokens_of_other_files_are_added(tmp_path: Path) -> None:
    """A special token may be an existing piece. A special token without an id, to which transformers assigns
    one beyond the vocabulary, is ignored."""
    backend = BACKENDS["byte-level"]
    size, piece = backend.get_vocab_size(), "he"
    decoder = {str(size + n): {"content": f"<{n}>", "special": n == 0} for n in (1, 0)}
    names = {"pad_token": piece, "unk_token": "<nowhere>"}
    tokenizer, peer = ours_and_transformers(tmp_path, backend, added_tokens_decoder=decoder, **names)
    assert tokenizer.vocab_size == size + 2
    for text in ("a<0> <1>the", "<0><1>"):
        ids = tokenizer.encode(text)
        assert ids == peer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == peer.decode(ids, skip_special_tokens=True)
    assert tokenizer.encode("<0>the") == [size, backend.token_to_id("t"), backend.token_to_id(piece)]
    assert size not in tokenizer.encode("<nowhere>")


def test_different_ids_of_a_token_in_two_files_are_refused(tmp_path: Path) -> None:
    size = BACKENDS["byte-level"].get_vocab_size()
    folder = write_folder(
        tmp_path, BACKENDS["byte-level"], added_tokens_decoder={str(size + 7): {"content": "<x>"}}
    )
    with pytest.raises(InputError, match=rf"'<x>' has id {size} in tokenizer\.json and id {size + 7} in"):
        Tokenizer.from_folder(folder)


def test_a_normalizer_for_added_tokens_does_not_bypass_the_guard() -> None:
    backend = make_byte_level()
    backend.normalizer = normalizers.Lowercase()
    backend.add_tokens([AddedToken("<call>", special=False, normalized=True)])
    tokenizer = Tokenizer(HFTokenizerBackend(backend))
    assert tokenizer.encode("<CALL>") == [backend.token_to_id("<call>")]
    assert tokenizer.find_added_token("a <CALL>") == "<call>"
    assert backend.token_to_id("<call>") not in tokenizer.encode("<CALL>", untrusted=range(6))
