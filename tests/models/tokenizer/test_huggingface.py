"""A tokenizer.json gives the ids of transformers, and no untrusted text passes for an added token."""

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
from trimtab.models.tokenizer.backend import Place, spliced
from trimtab.models.tokenizer.huggingface import JsonVocabulary
from trimtab.models.tokenizer.tokenizer import Tokenizer

from ...helpers.vocabularies import AWKWARD, FORGERIES, OTHER, SPECIAL, byte_fallback, byte_level, unigram

if TYPE_CHECKING:
    from pathlib import Path

BACKENDS = {
    "byte-level": byte_level(),
    "byte-fallback": byte_fallback(),
    "byte-fallback, always a space": byte_fallback("always"),
    "byte-fallback, a normaliser's space": byte_fallback("normalizer"),
    "unigram": unigram(),
}
backends = pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
LOOK_ALIKES = [
    *FORGERIES,
    *(f"{text}{forgery}" for text, forgery in zip(AWKWARD, FORGERIES * 99, strict=False)),
]


def folder_of(folder: Path, backend: Backend, **config: Any) -> Path:
    backend.save(str(folder / "tokenizer.json"))
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**named, **config}))
    return folder


def both(folder: Path, backend: Backend, **config: Any) -> tuple[Tokenizer, Any]:
    """Our tokenizer of a folder and that of transformers."""
    folder_of(folder, backend, **config)
    return Tokenizer.from_folder(folder), AutoTokenizer.from_pretrained(str(folder))


@backends
def test_awkward_texts_have_the_ids_and_the_text_of_transformers(tmp_path: Path, backend: Backend) -> None:
    tokenizer, peer = both(tmp_path, backend)
    for text in [*AWKWARD, *LOOK_ALIKES, *(f"a{token} b" for token in OTHER)]:
        ids = tokenizer.encode(text)
        assert ids == peer.encode(text, add_special_tokens=False), text
        for skip in (True, False):
            assert tokenizer.decode(ids, skip) == peer.decode(ids, skip_special_tokens=skip), text


@backends
def test_look_alikes_that_are_not_to_be_trusted_have_the_ids_of_transformers(
    tmp_path: Path, backend: Backend
) -> None:
    tokenizer, peer = both(tmp_path, backend)
    for text in [*AWKWARD, *LOOK_ALIKES]:
        expected = peer.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert tokenizer.encode(text, foreign=range(len(text))) == expected, text


@backends
@pytest.mark.parametrize("text", [f"{text}{token}{text}" for token in OTHER for text in ("", "a ", " ")])
def test_added_tokens_that_are_not_special_are_not_trusted_either(backend: Backend, text: str) -> None:
    """transformers reads these even so; the oracle is the same vocabulary without them."""
    plain = Backend.from_str(backend.to_str())
    plain = Backend.from_str(json.dumps({**json.loads(plain.to_str()), "added_tokens": []}))
    tokenizer = Tokenizer(JsonVocabulary(backend))
    assert (
        tokenizer.encode(text, foreign=range(len(text))) == plain.encode(text, add_special_tokens=False).ids
    )


@backends
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_text_has_the_same_ids_in_pieces(backend: Backend, data: st.DataObject) -> None:
    parts = st.sampled_from([*SPECIAL, *OTHER, *AWKWARD])
    text = "".join(data.draw(st.lists(parts, max_size=6)))
    vocabulary = JsonVocabulary(backend)
    ids, found = vocabulary.read(text)
    assert ids == vocabulary.encode(text)
    assert spliced(text, found, vocabulary.ordinary) == ids


@backends
def test_added_tokens_side_by_side_have_the_same_ids_in_pieces(backend: Backend) -> None:
    """A normaliser's space is looked for with the token that follows it, and put there only once."""
    vocabulary = JsonVocabulary(backend)
    for parts in product(["a", " ", *OTHER, *SPECIAL[:2]], repeat=3):
        text = "".join(parts)
        ids, found = vocabulary.read(text)
        assert spliced(text, found, vocabulary.ordinary) == ids, text


FULL_WIDTH = "\uff1cs\uff1e"
"""NFKC makes "<s>" of it."""


@pytest.mark.parametrize("text", [*FORGERIES, FULL_WIDTH, f"a {FULL_WIDTH}<s>", *AWKWARD[:20]])
def test_no_piece_of_a_vocabulary_passes_for_an_added_token(text: str) -> None:
    """Converted vocabularies list added tokens among their pieces, where plain cutting finds them."""
    backend = unigram(*SPECIAL)
    reserved = {backend.token_to_id(token) for token in SPECIAL}
    plain = Backend.from_str(json.dumps({**json.loads(backend.to_str()), "added_tokens": []}))
    ids = Tokenizer(JsonVocabulary(backend)).encode(text, foreign=range(len(text)))
    assert reserved.isdisjoint(ids)
    assert plain.decode(ids) == plain.decode(plain.encode(text).ids)
    assert reserved & set(plain.encode("a<s>").ids), "the vocabulary would forge"


def test_what_stands_for_unknown_text_is_no_forgery() -> None:
    backend = Backend(models.BPE({"<unk>": 0, "a": 1, "b": 2, "ab": 3}, [("a", "b")], unk_token="<unk>"))
    backend.add_special_tokens(["<unk>"])
    tokenizer = Tokenizer(JsonVocabulary(backend))
    assert tokenizer.encode("ab?ab", foreign=range(5)) == [3, 0, 3]


@pytest.mark.parametrize(
    ("flags", "text", "foreign", "expected"),
    [
        ({"lstrip": True}, "a  <x> b", [], ["a", "<x>", "Ġ", "b"]),
        ({"rstrip": True}, "a  <x> b", [], ["a", "Ġ", "Ġ", "<x>", "b"]),
        ({"lstrip": True}, "a  <x><x>", [6], ["a", "<x>", "<", "x", ">"]),
        ({"rstrip": True}, "<x>  <x> b", [0], ["<", "x", ">", "Ġ", "Ġ", "<x>", "b"]),
        ({"single_word": True}, "a<x> <x>", [], ["a", "<", "x", ">", "Ġ", "<x>"]),
    ],
)
def test_white_space_that_goes_with_a_token_goes_with_it(
    flags: dict[str, bool], text: str, foreign: list[int], expected: list[str]
) -> None:
    backend = Backend(models.BPE({c: i for i, c in enumerate("abx<>Ġ")}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.add_special_tokens([AddedToken("<x>", **flags)])
    vocabulary = JsonVocabulary(backend)
    ids = Tokenizer(vocabulary).encode(text, foreign=foreign)
    assert vocabulary.tokens(ids, False) == expected


def test_white_space_is_nobodys_forgery() -> None:
    backend = byte_level()
    backend.add_tokens([AddedToken("    ", special=False, normalized=False)])
    tokenizer = Tokenizer(JsonVocabulary(backend))
    indent = backend.token_to_id("    ")
    assert tokenizer.added_token_in("    x") == ""
    assert tokenizer.encode("    <s>", foreign=[4, 5, 6])[0] == indent


@pytest.mark.parametrize("place", Place)
def test_a_prefix_space_stands_where_the_vocabulary_puts_it(place: Place) -> None:
    started = {
        "byte-fallback": {Place.START},
        "byte-fallback, always a space": {Place.START, Place.AFTER_TOKEN, Place.AFTER_NORMALIZED},
        "byte-fallback, a normaliser's space": {Place.START, Place.AFTER_TOKEN},
    }
    for name, places in started.items():
        vocabulary = JsonVocabulary(BACKENDS[name])
        text = "".join(vocabulary.tokens(vocabulary.ordinary("fox", place), False))
        assert text == "▁fox" if place in places else text == "fox"


def test_a_byte_level_prefix_space_is_kept_out_of_the_middle() -> None:
    backend = Backend(models.BPE({"a": 0, "Ġ": 1}, []))
    steps = [pre_tokenizers.Sequence([]), pre_tokenizers.ByteLevel(add_prefix_space=True)]
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    vocabulary = JsonVocabulary(backend)
    assert [vocabulary.ordinary("a", place) for place in Place] == [[1, 0], [1, 0], [1, 0], [0]]


@pytest.mark.parametrize("add_bos_token", [None, False, True])
@pytest.mark.parametrize("add_eos_token", [None, False, True])
@pytest.mark.parametrize("single", [None, "$A", "<s> $A", "<s> $A </s>"])
def test_both_ends_are_as_transformers_adds_them(
    tmp_path: Path, add_bos_token: bool | None, add_eos_token: bool | None, single: str | None
) -> None:
    backend = Backend.from_str(BACKENDS["byte-level"].to_str())
    if single:
        tokens = [(token, backend.token_to_id(token)) for token in ("<s>", "</s>")]
        backend.post_processor = processors.TemplateProcessing(single, special_tokens=tokens)
    tokenizer, peer = both(tmp_path, backend, add_bos_token=add_bos_token, add_eos_token=add_eos_token)
    assert tokenizer.encode("a<s>", add_special_tokens=True) == peer.encode("a<s>")


def test_tokens_that_other_files_name_are_added(tmp_path: Path) -> None:
    """Also a piece that is named for a purpose. A name without an id, to which transformers gives one beyond
    the vocabulary, is no token."""
    backend = BACKENDS["byte-level"]
    size, piece = backend.get_vocab_size(), "he"
    decoder = {str(size + n): {"content": f"<{n}>", "special": n == 0} for n in (1, 0)}
    names = {"pad_token": piece, "unk_token": "<nowhere>"}
    tokenizer, peer = both(tmp_path, backend, added_tokens_decoder=decoder, **names)
    assert tokenizer.vocab_size == size + 2
    for text in ("a<0> <1>the", "<0><1>"):
        ids = tokenizer.encode(text)
        assert ids == peer.encode(text, add_special_tokens=False)
        assert tokenizer.decode(ids) == peer.decode(ids, skip_special_tokens=True)
    assert tokenizer.encode("<0>the") == [size, backend.token_to_id("t"), backend.token_to_id(piece)]
    assert size not in tokenizer.encode("<nowhere>")


def test_files_that_number_a_token_differently_are_refused_by_name(tmp_path: Path) -> None:
    size = BACKENDS["byte-level"].get_vocab_size()
    folder = folder_of(
        tmp_path, BACKENDS["byte-level"], added_tokens_decoder={str(size + 7): {"content": "<x>"}}
    )
    with pytest.raises(InputError, match=rf"'<x>' has id {size} by tokenizer\.json and id {size + 7} by"):
        Tokenizer.from_folder(folder)


def test_a_normaliser_for_added_tokens_is_no_way_around() -> None:
    backend = byte_level()
    backend.normalizer = normalizers.Lowercase()
    backend.add_tokens([AddedToken("<call>", special=False, normalized=True)])
    tokenizer = Tokenizer(JsonVocabulary(backend))
    assert tokenizer.encode("<CALL>") == [backend.token_to_id("<call>")]
    assert tokenizer.added_token_in("a <CALL>") == "<call>"
    assert backend.token_to_id("<call>") not in tokenizer.encode("<CALL>", foreign=range(6))
