from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend
from trimtab.kernels.errors import InputError
from trimtab.models.tokenizer import Tokenizer
from trimtab.models.tokenizer_json import JsonVocabulary

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

CORPUS = [
    "The quick brown fox jumps over the lazy dog, again and again.",
    "  two spaces   three spaces\tand a tab\nand a line",
    "naïve café, Zürich, 東京 is 東京, العربية, שלום",
    "👩‍👩‍👧‍👦 family 🏳️‍🌈 flag é combining",
] * 8
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
AWKWARD = [
    "👩‍👩‍👧‍👦", "🏳️‍🌈", "e\u0301\u0323", "العربية", "\u202eabc", "東京", "\ufffd", "\ufffd\ufffd", "\x00",
    "\x7f", "\r\n", " ", "  ", "\u00a0", "▁", "Ġ", "<0x41>", "<0xE2>", "</s>", "<s>", "\U0010ffff",
    "ß", "the", " fox", ".",
]  # fmt: skip
texts = st.lists(st.one_of(st.sampled_from(AWKWARD), st.text(max_size=4)), max_size=12).map("".join)


def add_specials(backend: Backend) -> Backend:
    backend.add_special_tokens(["<s>", "</s>"])
    backend.add_tokens([AddedToken("<tool>", special=False), AddedToken("Ünï x", special=False)])
    return backend


def byte_level() -> Backend:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    return add_specials(backend)


def llama_decoder() -> Any:
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    return decoders.Sequence(steps)


def byte_fallback_bpe() -> Backend:
    trained = Backend(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=200, show_progress=False))
    found = json.loads(trained.to_str())["model"]
    entries = ["<unk>", *BYTES, *found["vocab"]]
    merges = [tuple(pair) for pair in found["merges"]]
    model = models.BPE({t: i for i, t in enumerate(entries)}, merges, unk_token="<unk>", byte_fallback=True)
    backend = Backend(model)
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = llama_decoder()
    return add_specials(backend)


def unigram() -> Backend:
    trained = Backend(models.Unigram())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(
        CORPUS, trainers.UnigramTrainer(vocab_size=120, unk_token="<unk>", show_progress=False)
    )
    pieces = [
        (piece, score) for piece, score in json.loads(trained.to_str())["model"]["vocab"] if piece != "<unk>"
    ]
    entries = [("<unk>", 0.0), *((byte, -20.0) for byte in BYTES), *pieces]
    backend = Backend(models.Unigram(entries, 0, byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    return add_specials(backend)


BACKENDS = {"byte-level": byte_level(), "byte-fallback": byte_fallback_bpe(), "unigram": unigram()}
VOCABULARIES = {name: JsonVocabulary(backend) for name, backend in BACKENDS.items()}
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
    "byte-level and more": lambda: decoders.Sequence([decoders.ByteLevel(), decoders.Replace("a", "b")]),
    "end of word": lambda: decoders.BPEDecoder("▁"),
    "ctc": lambda: decoders.CTC("a", "▁"),
    "two stripped in front": lambda: decoders.Sequence(
        [decoders.Metaspace(), decoders.Fuse(), decoders.Strip("e", 2, 0)]
    ),
    "rewritten when whole": lambda: decoders.Sequence([llama_decoder(), decoders.Replace(" f", "ph")]),
    "the anchor stripped": lambda: decoders.Sequence([llama_decoder(), decoders.Strip("a", 3, 0)]),
}


def id_lists(tokenizer: Tokenizer) -> st.SearchStrategy[list[int]]:
    """Ids as no encoder would write them: lone bytes, broken runs, special and unknown ids."""
    anything = st.integers(0, tokenizer.vocab_size + 2)
    low = st.integers(0, 256)  # in the byte-fallback vocabularies these are the bytes
    specials = st.integers(tokenizer.vocab_size - 4, tokenizer.vocab_size - 1)
    written = texts.map(tokenizer.encode)
    pieces = st.one_of(
        st.lists(anything, max_size=4), st.lists(low, max_size=5), st.lists(specials, max_size=1), written
    )
    return st.lists(pieces, max_size=8).map(lambda parts: [i for part in parts for i in part])


def pushes(data: st.DataObject, ids: list[int]) -> Iterator[list[int]]:
    while ids:
        size = data.draw(st.sampled_from([1, 1, 1, 2, 5]))
        yield ids[:size]
        ids = ids[size:]


def streamed(tokenizer: Tokenizer, steps: Iterator[list[int]], skip: bool = True) -> list[str]:
    detokenizer = tokenizer.detokenizer(skip)
    return [*map(detokenizer.push, steps), detokenizer.finish()]


def check_any_ids(tokenizer: Tokenizer, data: st.DataObject) -> None:
    ids, skip = data.draw(id_lists(tokenizer)), data.draw(st.booleans())
    assert "".join(streamed(tokenizer, pushes(data, ids), skip)) == tokenizer.decode(ids, skip)


@trained
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_streamed_text_of_any_ids_is_their_decoded_text(tokenizer: Tokenizer, data: st.DataObject) -> None:
    check_any_ids(tokenizer, data)


@pytest.mark.parametrize("name", OTHER_DECODERS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_streamed_text_is_the_decoded_text_for_any_decoder(name: str, data: st.DataObject) -> None:
    backend = Backend.from_str(BACKENDS["byte-fallback"].to_str())
    backend.decoder = OTHER_DECODERS[name]()
    check_any_ids(Tokenizer(JsonVocabulary(backend)), data)


@pytest.mark.parametrize(
    ("step", "tokens", "expected"),
    [
        (decoders.Strip("-", 0, 2), ["the", "-", "-", "-"], "the-"),
        (decoders.Strip("-", 2, 0), ["-", "-", "-", "the"], "-the"),
        (decoders.Replace("--", "+"), ["the", "-", "-", "the"], "the+the"),
    ],
)
def test_what_a_decoder_does_to_the_whole_text_is_done_to_the_streamed_text(
    step: Any, tokens: list[str], expected: str
) -> None:
    backend = Backend(models.WordLevel({"the": 0, "-": 1}, unk_token="-"))
    backend.decoder = decoders.Sequence([decoders.Fuse(), step])
    tokenizer = Tokenizer(JsonVocabulary(backend))
    ids = [backend.token_to_id(token) for token in tokens]
    assert tokenizer.decode(ids) == expected
    assert "".join(streamed(tokenizer, iter([[i] for i in ids]))) == expected


@settings(max_examples=150, deadline=None)
@given(text=texts)
def test_a_byte_level_text_is_complete_with_its_last_token(text: str) -> None:
    tokenizer = TRAINED["byte-level"]
    detokenizer = tokenizer.detokenizer(skip_special_tokens=False)
    assert "".join(detokenizer.push([i]) for i in tokenizer.encode(text)) == text
    assert detokenizer.finish() == ""


@pytest.mark.parametrize("name", ["byte-fallback", "unigram"])
def test_text_before_a_byte_run_is_out_at_once_and_the_run_when_it_ends(name: str) -> None:
    tokenizer = TRAINED[name]
    run = BACKENDS[name].encode("x\u1234\u1234y", add_special_tokens=False)
    detokenizer = tokenizer.detokenizer()
    pieces = dict(zip(range(len(run.ids)), (detokenizer.push([i]) for i in run.ids), strict=True))
    assert [pieces[i] for i, token in enumerate(run.tokens) if token.startswith("<0x")] == [""] * 6
    assert [piece for piece in pieces.values() if piece] == ["x", "\u1234\u1234y"]


def test_one_bad_byte_makes_its_whole_run_replacement_characters() -> None:
    tokenizer = TRAINED["byte-fallback"]
    ids = [1 + 0xE4, 1 + 0xBD, 1 + 0xA0, 1 + 0xFF]
    detokenizer = tokenizer.detokenizer()
    assert [detokenizer.push([i]) for i in ids] == [""] * 4
    assert detokenizer.finish() == "\ufffd" * 4


def test_a_skipped_special_token_inside_a_byte_run_does_not_end_it() -> None:
    tokenizer = TRAINED["byte-fallback"]
    (eos,) = tokenizer.eos_token_ids
    detokenizer = tokenizer.detokenizer()
    assert detokenizer.push([1 + 0xC3, eos]) == ""
    assert detokenizer.push([1 + 0xA9, *tokenizer.encode("fox")]) == "é fox"


def test_an_unfinished_character_at_the_end_is_a_replacement_character() -> None:
    tokenizer = TRAINED["byte-level"]
    detokenizer = tokenizer.detokenizer()
    assert detokenizer.push(tokenizer.encode("\U0010ffff")[:2]) == ""
    assert detokenizer.finish() == "\ufffd"


@pytest.mark.parametrize("name", ["byte-fallback", "unigram"])
@pytest.mark.parametrize("text", ["the fox " * 200, "\u1234" * 400, "\n" * 500])
def test_each_token_is_decoded_once(name: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, decoded = TRAINED[name], 0
    ids = tokenizer.encode(text)
    join = VOCABULARIES[name].join

    def counting(tokens: list[str]) -> str:
        nonlocal decoded
        decoded += len(tokens)
        return join(tokens)

    monkeypatch.setattr(VOCABULARIES[name], "join", counting)
    assert "".join(streamed(tokenizer, iter([[i] for i in ids]))) == tokenizer.decode(ids)
    assert decoded <= 2 * len(ids) + 10  # an anchor goes with every decoded token


@pytest.mark.parametrize("name", VOCABULARIES)
@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_decode_joins_the_entries_it_names(name: str, data: st.DataObject) -> None:
    vocabulary, ids = VOCABULARIES[name], data.draw(id_lists(TRAINED[name]))
    skip = data.draw(st.booleans())
    assert vocabulary.join(vocabulary.tokens(ids, skip)) == vocabulary.decode(ids, skip)


def test_encode_reads_special_tokens_and_adds_them_only_when_asked() -> None:
    backend = BACKENDS["byte-level"]
    backend = Backend.from_str(backend.to_str())
    bos, eos = backend.token_to_id("<s>"), backend.token_to_id("</s>")
    backend.post_processor = processors.TemplateProcessing(
        "<s> $A </s>", special_tokens=[("<s>", bos), ("</s>", eos)]
    )
    tokenizer = Tokenizer(JsonVocabulary(backend))
    plain = tokenizer.encode("fox<s>")
    assert plain[-1] == bos
    assert eos not in plain
    assert tokenizer.encode("fox<s>", add_special_tokens=True) == [bos, *plain, eos]
    assert tokenizer.prefix_token_ids == [bos]
    assert tokenizer.decode(plain) == "fox"
    assert tokenizer.decode(plain, skip_special_tokens=False) == "fox<s>"


def test_a_saved_truncation_or_padding_does_not_touch_prompts() -> None:
    backend = Backend.from_str(BACKENDS["byte-level"].to_str())
    backend.enable_truncation(4)
    backend.enable_padding(length=50)
    tokenizer = Tokenizer(JsonVocabulary(backend))
    assert tokenizer.decode(tokenizer.encode(CORPUS[0])) == CORPUS[0]


def test_a_lone_surrogate_is_refused_by_name() -> None:
    with pytest.raises(InputError, match=r"\\ud83d at character 2"):
        TRAINED["byte-level"].encode("ab\ud83d")


def folder_with(folder: Path, **files: Any) -> Path:
    BACKENDS["byte-level"].save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def ids_of(*tokens: str) -> tuple[int, ...]:
    return tuple(BACKENDS["byte-level"].token_to_id(t) for t in tokens)


@pytest.mark.parametrize(
    "form", [lambda t: t, lambda t: {"__type": "AddedToken", "content": t, "lstrip": False}]
)
def test_special_tokens_are_read_in_both_forms(tmp_path: Path, form: Callable[[str], Any]) -> None:
    config = {"bos_token": form("<s>"), "eos_token": form("</s>")}
    tokenizer = Tokenizer.from_folder(folder_with(tmp_path, tokenizer_config=config))
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    assert tokenizer.eos_token_ids == ids_of("</s>")


def test_a_tokenizer_without_bos_has_an_empty_one_whatever_the_model_config_says(tmp_path: Path) -> None:
    folder = folder_with(
        tmp_path, tokenizer_config={"bos_token": None, "eos_token": "</s>"}, config={"bos_token_id": 1}
    )
    assert Tokenizer.from_folder(folder).bos_token == ""


def test_without_tokenizer_config_special_tokens_come_from_the_models_ids(tmp_path: Path) -> None:
    bos, eos = ids_of("<s>", "</s>")
    folder = folder_with(tmp_path, config={"bos_token_id": bos, "eos_token_id": [eos, bos]})
    tokenizer = Tokenizer.from_folder(folder)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    assert tokenizer.eos_token_ids == (eos, bos)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"generation_config": {"eos_token_id": [5, 7]}, "config": {"eos_token_id": 3}}, (5, 7)),
        ({"generation_config": {"eos_token_id": 0}, "config": {"eos_token_id": 3}}, (0,)),
        ({"generation_config": {"eos_token_id": None}, "config": {"eos_token_id": 3}}, (3,)),
        ({"config": {}, "tokenizer_config": {"eos_token": "</s>"}}, ids_of("</s>")),
        ({}, ()),
    ],
)
def test_eos_ids_come_from_generation_config_then_config_then_tokenizer(
    tmp_path: Path, files: dict[str, Any], expected: tuple[int, ...]
) -> None:
    assert Tokenizer.from_folder(folder_with(tmp_path, **files)).eos_token_ids == expected


def test_vocab_size_counts_added_tokens_and_gaps() -> None:
    backend = Backend(models.WordLevel({"a": 0, "b": 9}, unk_token="a"))
    assert Tokenizer(JsonVocabulary(backend)).vocab_size == 10
    backend.add_tokens(["<new>"])
    added = backend.token_to_id("<new>")
    assert Tokenizer(JsonVocabulary(backend)).vocab_size == max(9, added) + 1


def test_a_folder_without_tokenizer_json_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no tokenizer\.json and no tokenizer\.model") as caught:
        Tokenizer.from_folder(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("content", ["{", "[]", '{"version": "1.0"}', ""])
def test_a_broken_tokenizer_json_is_refused_in_one_sentence(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(InputError, match=r"tokenizer\.json' is no tokenizer that can be read") as caught:
        Tokenizer.from_folder(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("files", "match"),
    [
        ({"generation_config": {"eos_token_id": "2"}}, r"eos_token_id in .*generation_config\.json' is '2'"),
        ({"config": {"eos_token_id": [2, -1]}}, r"eos_token_id in .*config\.json' is \[2, -1\]"),
        ({"tokenizer_config": {"bos_token": 4}}, "bos_token in .* is 4"),
        ({"config": [1]}, r"config\.json' holds a JSON list"),
    ],
)
def test_a_wrong_value_in_a_config_file_is_refused_by_name(
    tmp_path: Path, files: dict[str, Any], match: str
) -> None:
    with pytest.raises(InputError, match=match):
        Tokenizer.from_folder(folder_with(tmp_path, **files))


def test_a_config_file_that_is_no_json_is_refused_by_name(tmp_path: Path) -> None:
    (folder_with(tmp_path) / "tokenizer_config.json").write_text("{'a'")
    with pytest.raises(InputError, match=r"tokenizer_config\.json' is not valid JSON"):
        Tokenizer.from_folder(tmp_path)


def test_the_demo_tokenizer_streams_what_it_decodes(demo_folder: Path) -> None:
    tokenizer = Tokenizer.from_folder(demo_folder)
    text = "".join(AWKWARD) + "".join(CORPUS[:4])
    ids = tokenizer.encode(text)
    assert "".join(streamed(tokenizer, iter([[i] for i in ids]))) == tokenizer.decode(ids)
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")
    assert (tokenizer.eos_token_ids, tokenizer.vocab_size) == ((2,), 49152)
