"""Special tokens of a tokenizer and the files that define them."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models, processors
from trimtab.kernels.common.errors import InputError
from trimtab.models.tokenizer.huggingface import HFTokenizerBackend
from trimtab.models.tokenizer.tokenizer import Tokenizer

from ...helpers.vocabularies import CORPUS, make_byte_level

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

BACKEND = make_byte_level()


def test_encode_recognizes_special_tokens_and_adds_them_only_if_requested() -> None:
    backend = BACKEND
    backend = Backend.from_str(backend.to_str())
    bos, eos = backend.token_to_id("<s>"), backend.token_to_id("</s>")
    backend.post_processor = processors.TemplateProcessing(
        "<s> $A </s>", special_tokens=[("<s>", bos), ("</s>", eos)]
    )
    tokenizer = Tokenizer(HFTokenizerBackend(backend))
    plain = tokenizer.encode("fox<s>")
    assert plain[-1] == bos
    assert eos not in plain
    assert tokenizer.encode("fox<s>", add_special_tokens=True) == [bos, *plain, eos]
    assert tokenizer.prefix_token_ids == [bos]
    assert tokenizer.decode(plain) == "fox"
    assert tokenizer.decode(plain, skip_special_tokens=False) == "fox<s>"


def test_saved_truncation_and_padding_do_not_apply_to_prompts() -> None:
    backend = Backend.from_str(BACKEND.to_str())
    backend.enable_truncation(4)
    backend.enable_padding(length=50)
    tokenizer = Tokenizer(HFTokenizerBackend(backend))
    assert tokenizer.decode(tokenizer.encode(CORPUS[0])) == CORPUS[0]


def test_the_error_for_a_lone_surrogate_names_it() -> None:
    with pytest.raises(InputError, match=r"\\ud83d at character 2"):
        Tokenizer(HFTokenizerBackend(BACKEND)).encode("ab\ud83d")


def folder_with(folder: Path, **files: Any) -> Path:
    BACKEND.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def ids_of(*tokens: str) -> tuple[int, ...]:
    return tuple(BACKEND.token_to_id(t) for t in tokens)


@pytest.mark.parametrize(
    "form", [lambda t: t, lambda t: {"__type": "AddedToken", "content": t, "lstrip": False}]
)
def test_special_tokens_are_read_in_both_forms(tmp_path: Path, form: Callable[[str], Any]) -> None:
    config = {"bos_token": form("<s>"), "eos_token": form("</s>")}
    tokenizer = Tokenizer.from_folder(folder_with(tmp_path, tokenizer_config=config))
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<s>", "</s>")
    assert tokenizer.eos_token_ids == ids_of("</s>")


def test_a_null_bos_token_overrides_the_bos_id_of_the_model_config(tmp_path: Path) -> None:
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
    assert Tokenizer(HFTokenizerBackend(backend)).vocab_size == 10
    backend.add_tokens(["<new>"])
    added = backend.token_to_id("<new>")
    assert Tokenizer(HFTokenizerBackend(backend)).vocab_size == max(9, added) + 1


def test_the_error_for_a_missing_tokenizer_file_names_the_folder(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no tokenizer\.json and no tokenizer\.model") as caught:
        Tokenizer.from_folder(tmp_path)
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("content", ["{", "[]", '{"version": "1.0"}', ""])
def test_a_corrupt_tokenizer_json_is_a_one_line_error(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(InputError, match=r"tokenizer\.json' is a corrupt tokenizer file") as caught:
        Tokenizer.from_folder(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("files", "match"),
    [
        ({"generation_config": {"eos_token_id": "2"}}, r"eos_token_id in .*generation_config\.json' is '2'"),
        ({"config": {"eos_token_id": [2, -1]}}, r"eos_token_id in .*config\.json' is \[2, -1\]"),
        ({"tokenizer_config": {"bos_token": 4}}, "bos_token in .* is 4"),
        ({"config": [1]}, r"config\.json' contains a JSON list"),
    ],
)
def test_the_error_for_an_invalid_config_value_names_key_and_file(
    tmp_path: Path, files: dict[str, Any], match: str
) -> None:
    with pytest.raises(InputError, match=match):
        Tokenizer.from_folder(folder_with(tmp_path, **files))


def test_the_error_for_an_invalid_json_file_names_it(tmp_path: Path) -> None:
    (folder_with(tmp_path) / "tokenizer_config.json").write_text("{'a'")
    with pytest.raises(InputError, match=r"tokenizer_config\.json' is not valid JSON"):
        Tokenizer.from_folder(tmp_path)
