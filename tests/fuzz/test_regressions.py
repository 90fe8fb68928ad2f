"""Regression tests for bugs found by fuzzing and by review."""

from __future__ import annotations

import json
import os
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from tokenizers import AddedToken
from trimtab.engine import AsyncEngine, Request, SamplingParams
from trimtab.engine.server.steering import Profiles
from trimtab.kernels.common.errors import MAX_ERROR_TEXT, MAX_REPR, InputError, short_repr
from trimtab.models.common.json_files import MAX_FILE_BYTES, read_json
from trimtab.models.config import ModelConfig
from trimtab.models.gguf.convert import convert
from trimtab.models.tokenizer.added_token_matcher import AddedTokenMatcher
from trimtab.models.tokenizer.backend import AddedTokenMatch, TextPosition
from trimtab.models.tokenizer.tokenizer import Tokenizer
from trimtab.tools.cli.main import main
from trimtab.tools.common import questions

from ..helpers import gguf_files, vocabularies
from ..helpers.tiny_model import TinyModel, write_json

if TYPE_CHECKING:
    from pathlib import Path

DEEP_JSON = "[" * 100_000 + "]" * 100_000


def nested_json(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


def make_endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def make_pipe(path: Path) -> None:
    os.mkfifo(path)


def make_huge(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(MAX_FILE_BYTES + 1)


@pytest.mark.parametrize("make", [make_endless, make_pipe, make_huge])
@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "generation_config.json"])
def test_an_endless_file_is_refused(tmp_path: Path, make: Any, name: str) -> None:
    folder = TinyModel().write(tmp_path / "model")
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    with pytest.raises(InputError, match=r"is not a regular file|the maximum is"):
        read_json(folder / name)
    with pytest.raises(InputError, match=r"is not a regular file|the maximum is"):
        ModelConfig.from_folder(folder) if name == "config.json" else Tokenizer.from_folder(folder)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer.model"])
def test_an_oversized_vocabulary_is_refused(tmp_path: Path, name: str) -> None:
    make_huge(tmp_path / name)
    with pytest.raises(InputError, match="the maximum is"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("value", [nested_json(100_000), 10**5000, "x" * 10**6], ids=["deep", "long", "wide"])
def test_a_value_too_large_to_print_is_still_reported(value: Any) -> None:
    assert 0 < len(short_repr(value)) <= MAX_REPR


def test_an_error_message_stays_short_for_any_input(tmp_path: Path) -> None:
    folder = TinyModel().write(tmp_path / "model")
    write_json(folder / "tokenizer_config.json", {"pad_token": ["x" * 10**6]})
    with pytest.raises(InputError) as refusal:
        Tokenizer.from_folder(folder)
    assert len(str(refusal.value)) < MAX_ERROR_TEXT + len(str(folder))


PANICS: dict[str, dict[str, Any]] = {
    "decoder": {"decoder": {"type": "Strip", "content": "x", "start": 1, "stop": 1}},
    "normalizer": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
    "pre_tokenizer": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "post_processor": {
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "zz", "type_id": 0}}],
            "pair": [],
            "special_tokens": {},
        }
    },
}


@pytest.mark.parametrize("part", PANICS)
def test_a_panic_of_the_tokenizers_package_is_reported_in_a_sentence(tmp_path: Path, part: str) -> None:
    tokenizer_json = json.loads(vocabularies.make_byte_fallback().to_str())
    write_json(tmp_path / "tokenizer.json", {**tokenizer_json, **PANICS[part]})
    with pytest.raises(InputError, match=r"tokenizer\.json") as refusal:
        Tokenizer.from_folder(tmp_path).decode(Tokenizer.from_folder(tmp_path).encode("xx x"))
    assert "\n" not in str(refusal.value)


def test_a_panic_while_decoding_an_answer_ends_only_that_answer(tmp_path: Path) -> None:
    folder = TinyModel().write(tmp_path / "model")
    tokenizer_json = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    write_json(folder / "tokenizer.json", {**tokenizer_json, **PANICS["decoder"]})
    engine = AsyncEngine.from_pretrained(str(folder), kv_cache_memory="1MiB")
    one, other = [tokenizer_json["model"]["vocab"][text] for text in "xy"]
    requests = {
        token: Request(
            branch_token_ids=[[5]],
            sampling=SamplingParams(max_tokens=1, logit_bias={token: 1e20}),
            trace=False,
        )
        for token in (one, other)
    }
    try:
        assert "tokenizer.json cannot decode the tokens" in str(engine.submit(requests[one]).result(60).error)
        assert engine.submit(requests[other]).result(60).token_ids == [other]
    finally:
        engine.shutdown()


def test_a_token_id_beyond_every_vocabulary_is_ignored(tmp_path: Path) -> None:
    folder = TinyModel().write(tmp_path / "model")
    (folder / "tokenizer_config.json").unlink()
    write_json(folder / "generation_config.json", {"bos_token_id": 2**63})
    assert Tokenizer.from_folder(folder).bos_token == ""


def test_white_space_before_an_lstrip_token_is_scanned_once() -> None:
    splitter = AddedTokenMatcher(
        [
            (AddedToken("<mask>", lstrip=True), 7, TextPosition.AFTER_TOKEN),
            (AddedToken("  "), 8, TextPosition.AFTER_TOKEN),
        ]
    )
    assert splitter.find_matches(" " * 99_999 + "x") == [
        AddedTokenMatch(at, at + 2, 8, TextPosition.AFTER_TOKEN) for at in range(0, 99_998, 2)
    ]
    assert [each[:3] for each in splitter.find_matches("x \n\t <mask>\n <mask>")] == [(1, 11, 7), (11, 19, 7)]
    assert [each[:3] for each in splitter.find_matches("  x   <mask>")] == [(0, 2, 8), (3, 12, 7)]
    alone = AddedTokenMatcher([(AddedToken("<mask>", lstrip=True), 7, TextPosition.AFTER_TOKEN)])
    assert alone.find_matches(" " * 10**6 + "x") == []
    behind = AddedTokenMatcher(
        [
            (AddedToken("a ", rstrip=False), 1, TextPosition.START),
            (AddedToken("b", lstrip=True), 2, TextPosition.START),
        ]
    )
    assert [each[:3] for each in behind.find_matches("a   b")] == [(0, 2, 1), (2, 5, 2)]


def test_a_million_letter_text_is_split_only_at_piece_boundaries(tmp_path: Path) -> None:
    tokens = ["<unk>", "a", "aa", "a" * 10**6]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [2, 1, 1, 1],
        "tokenizer.ggml.scores": [0.0, -1.0, -2.0, -3.0],
        "tokenizer.ggml.add_bos_token": False,
        **dict.fromkeys(f"tokenizer.ggml.{name}" for name in ("pre", "merges")),
        **dict.fromkeys(f"tokenizer.ggml.{name}_token_id" for name in ("bos", "eos", "padding")),
    }
    path = gguf_files.write_gguf(
        tmp_path / "long.gguf", metadata, gguf_files.random_tensors("F16", vocab=len(tokens))
    )
    folder = convert(path, tmp_path / "out")
    assert json.loads((folder / "tokenizer.json").read_text())["model"]["merges"] == [["a", "a"]]


@pytest.mark.parametrize("shape", [(0, 8), (1, 8), (9,)], ids=str)
def test_rope_frequencies_of_a_wrong_shape_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    contents = {**gguf_files.random_tensors(), "rope_freqs.weight": (np.ones(shape, np.float32), Kind.F32)}
    with pytest.raises(InputError, match=r"rope_freqs\.weight has shape"):
        convert(gguf_files.write_gguf(tmp_path / "a.gguf", {}, contents), tmp_path / "out")


def test_a_head_dimension_out_of_range_is_refused(tmp_path: Path) -> None:
    path = gguf_files.write_gguf(tmp_path / "a.gguf", {"llama.attention.key_length": 2**31})
    with pytest.raises(InputError, match=r"key_length is 2147483648; it must be an integer from 1 to"):
        convert(path, tmp_path / "out")


@pytest.mark.parametrize(
    ("key", "value"), [("context_length", 2**26), ("rope.freq_base", 1e30), ("block_count", 5000)]
)
def test_a_gguf_file_whose_model_would_be_refused_is_not_converted(
    tmp_path: Path, key: str, value: float
) -> None:
    path = gguf_files.write_gguf(tmp_path / "a.gguf", {f"llama.{key}": value})
    with pytest.raises(InputError):
        convert(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text", [DEEP_JSON, f'["a"]\n{DEEP_JSON}', f'{{"question": {DEEP_JSON}}}'], ids=["all", "line", "row"]
)
def test_questions_nested_too_deeply_are_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "questions.json"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match="is neither a JSON list of questions nor JSON lines"):
        questions.read_questions(str(file))


@pytest.mark.parametrize("preferences", [5, "Be brief.", {"text": "x"}, [5], [{}], [" "], True])
def test_preferences_that_are_not_a_list_of_texts_are_refused(tmp_path: Path, preferences: Any) -> None:
    file = tmp_path / "questions.json"
    write_json(file, [{"question": "Why?", "preferences": preferences}])
    with pytest.raises(InputError, match="they must be strings"):
        questions.read_questions(str(file))


LONG_KEYS = ("a." * 100_000 + "b", '"a".' * 100_000 + "b", "'a' . " * 100_000 + "b")
TOO_DEEP = [
    f"a = {DEEP_JSON}",
    *(f"{key} = 1" for key in LONG_KEYS),
    *(f"[{key}]" for key in LONG_KEYS),
    f"a = {{{LONG_KEYS[0]} = 1}}",
]


@pytest.mark.parametrize("text", TOO_DEEP, ids=range(len(TOO_DEEP)))
def test_profiles_nested_too_deeply_are_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "profiles.toml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"profiles\.toml"):
        Profiles.from_file(file)


def test_texts_of_profiles_may_contain_dots(tmp_path: Path) -> None:
    file = tmp_path / "profiles.toml"
    text = "Be brief. Be kind... Say 1.2.3.4, e.g. this. Or that: a.b.c.d. " * 9
    file.write_text(f'[kind]\nobjectives = ["{text}"]\n', encoding="utf-8")
    assert list(Profiles.from_file(file).definitions) == ["kind"]


def test_an_id_nested_too_deeply_to_serialise_does_not_stop_the_other_lines(
    tmp_path: Path, tiny_folder: Path
) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    depths = [1, *range(200, 1000, 20)]
    lines = [f'{{"prompt": "x", "id": {"[" * depth + "NaN" + "]" * depth}}}' for depth in depths]
    source.write_text("\n".join(lines), encoding="utf-8")
    flags = ["--model", str(tiny_folder), "--max-tokens", "1", "--kv-cache-memory", "2MiB"]
    assert main(["generate", "--input", str(source), "--output", str(target), *flags]) == 1
    answers = [json.loads(line) for line in target.read_text().splitlines()]
    assert sorted(answer["line"] for answer in answers) == list(range(1, len(depths) + 1))
    assert not next(answer for answer in answers if answer["line"] == 1).get("error")
