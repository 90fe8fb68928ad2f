from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING, Any

import pytest
from trimtab.engine import Engine, EngineConfig
from trimtab.engine.config import parse_bytes
from trimtab.kernels.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"dtype": "int8"}, "dtype is 'int8'; it must be one of auto, float32, bfloat16, float16"),
    ({"device": "tpu"}, "device is 'tpu'"),
    ({"max_model_len": 0}, "max_model_len is 0"),
    ({"max_num_seqs": 0}, "max_num_seqs is 0"),
    (
        {"max_num_seqs": 8, "max_num_batched_tokens": 7},
        "max_num_batched_tokens is 7; it must be at least max_num_seqs (8)",
    ),
    ({"block_size": 0}, "block_size is 0"),
    ({"kv_cache_memory": "lots"}, "'lots' is no size of memory"),
    ({"kv_cache_memory": ""}, "'' is no size of memory"),
    ({"kv_cache_memory": "0"}, "'0' is no size of memory"),
    ({"kv_cache_memory": "-4GiB"}, "'-4GiB' is no size of memory"),
    ({"kv_cache_memory": "nan"}, "'nan' is no size of memory"),
    ({"kv_cache_memory": "inf"}, "'inf' is no size of memory"),
    ({"kv_cache_memory": "1e999GiB"}, "'1e999GiB' is no size of memory"),
    ({"kv_cache_memory": "4 elephants"}, "'4 elephants' is no size of memory"),
    ({"kv_cache_memory": "4GG"}, "'4GG' is no size of memory"),
]


@pytest.mark.parametrize(("fields", "said"), REFUSED, ids=[str(fields) for fields, _ in REFUSED])
def test_a_setting_out_of_range_is_refused_by_name_and_value(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=re.escape(said)):
        EngineConfig(**fields)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("512MiB", 2**29),
        ("4GiB", 2**32),
        ("4gib", 2**32),
        ("4GB", 2**32),
        ("4g", 2**32),
        ("1TiB", 2**40),
        ("3KiB", 3072),
        ("3K", 3072),
        (" 1.5 MiB ", 1572864),
        ("1000", 1000),
        ("1000B", 1000),
    ],
)
def test_sizes_of_memory_read_as_they_are_said(text: str, size: int) -> None:
    assert parse_bytes(text) == size


def test_a_config_is_frozen_and_every_field_says_what_it_is() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        EngineConfig().dtype = "float32"  # type: ignore[misc]
    assert all(field.metadata["help"] for field in dataclasses.fields(EngineConfig))


def test_a_longer_context_than_the_models_is_refused(tiny_folder: Path) -> None:
    with pytest.raises(InputError, match="max_model_len is 513; the model was trained for at most 512"):
        Engine.from_pretrained(str(tiny_folder), max_model_len=513)


def test_a_cache_smaller_than_one_page_is_refused_with_the_bytes_of_a_page(tiny_folder: Path) -> None:
    # 16 tokens · 2 (K and V) · 2 layers · 2 heads · 6 numbers · 4 bytes
    with pytest.raises(
        InputError, match="kv_cache_memory is '3071'; one page of this model takes 3072 bytes"
    ):
        Engine.from_pretrained(str(tiny_folder), kv_cache_memory="3071")


def test_a_folder_that_is_not_there_is_refused_with_what_would_be_right(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"it must be 'demo', a folder with config\.json"):
        Engine.from_pretrained(str(tmp_path / "nowhere"))
