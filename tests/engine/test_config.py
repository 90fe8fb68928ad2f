"""EngineConfig: parsing of settings, and refusal by name and value."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
from trimtab.engine import Engine, EngineConfig
from trimtab.engine.config import parse_bytes
from trimtab.kernels.common.errors import InputError

REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"dtype": "int8"}, "dtype is 'int8'; it must be one of auto, float32, bfloat16, float16"),
    ({"device": "tpu"}, "device is 'tpu'; it must be auto, cpu, cuda or cuda:N"),
    ({"device": "cuda:"}, "device is 'cuda:'; it must be"),
    ({"gpu_memory_utilization": 0}, "gpu_memory_utilization is 0"),
    ({"gpu_memory_utilization": 1.5}, "gpu_memory_utilization is 1.5; it must be above 0 and at most 1"),
    ({"max_model_len": 0}, "max_model_len is 0"),
    ({"max_num_seqs": 0}, "max_num_seqs is 0"),
    ({"max_num_seqs": 65537, "max_num_batched_tokens": 65537}, "an integer from 1 to 65536"),
    (
        {"max_num_seqs": 8, "max_num_batched_tokens": 7},
        "max_num_batched_tokens is 7; it must be at least max_num_seqs (8)",
    ),
    ({"block_size": 0}, "block_size is 0"),
    ({"kv_cache_memory": "lots"}, "kv_cache_memory is 'lots'; it must be a size of memory"),
    ({"kv_cache_memory": ""}, "kv_cache_memory is ''; it must be a size of memory"),
    ({"kv_cache_memory": "0"}, "kv_cache_memory is '0'; it must be a size of memory"),
    ({"kv_cache_memory": "-4GiB"}, "kv_cache_memory is '-4GiB'; it must be a size of memory"),
    ({"kv_cache_memory": "nan"}, "kv_cache_memory is 'nan'; it must be a size of memory"),
    ({"kv_cache_memory": "inf"}, "kv_cache_memory is 'inf'; it must be a size of memory"),
    ({"kv_cache_memory": "1e999GiB"}, "kv_cache_memory is '1e999GiB'; it must be a size of memory"),
    ({"kv_cache_memory": "4 elephants"}, "kv_cache_memory is '4 elephants'; it must be a size of memory"),
    ({"kv_cache_memory": "4GG"}, "kv_cache_memory is '4GG'; it must be a size of memory"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED, ids=[str(fields) for fields, _ in REFUSED])
def test_a_setting_out_of_range_is_refused_by_name_and_value(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
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
def test_memory_sizes_with_units_are_parsed(text: str, size: int) -> None:
    assert parse_bytes(text) == size


def test_memory_may_be_a_number_of_bytes() -> None:
    assert EngineConfig(kv_cache_memory=1 << 30).kv_cache_memory == 2**30
    assert parse_bytes(1 << 30) == parse_bytes("1GiB")


def test_the_model_may_be_a_path_object() -> None:
    config = EngineConfig(model=Path("some/folder"), chat_template=Path("file.jinja"))
    assert (config.model, config.chat_template) == ("some/folder", "file.jinja")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("max_num_seq", "EngineConfig has no field 'max_num_seq'; did you mean max_num_seqs"),
        ("gpu", "EngineConfig has no field 'gpu'; its fields are model, dtype, device, "),
    ],
)
def test_an_unknown_field_is_refused_with_suggestions(name: str, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        Engine.from_pretrained("nowhere", **{name: 1})


def test_an_engine_can_be_built_from_a_config_alone() -> None:
    with pytest.raises(InputError, match=r"^config is 'demo'; it must be of type EngineConfig$"):
        Engine("demo")


def test_a_config_is_frozen_and_every_field_has_help() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        EngineConfig().dtype = "float32"  # type: ignore[misc]
    assert all(field.metadata["help"] for field in dataclasses.fields(EngineConfig))


def test_a_longer_context_than_the_models_is_refused(tiny_folder: Path) -> None:
    with pytest.raises(InputError, match="max_model_len is 513; the model was trained for at most 512"):
        Engine.from_pretrained(str(tiny_folder), max_model_len=513)


def test_a_cache_smaller_than_one_block_is_refused_with_the_block_size_in_bytes(tiny_folder: Path) -> None:
    # 16 tokens · 2 (K and V) · 2 layers · 2 heads · 8 numbers, 2 of them padding · 4 bytes
    with pytest.raises(InputError, match="kv_cache_memory is '4095'; one KV block takes 4096 bytes"):
        Engine.from_pretrained(str(tiny_folder), kv_cache_memory="4095", block_size=16)


def test_a_missing_folder_is_refused_with_a_hint(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"it must be 'demo', a folder with config\.json"):
        Engine.from_pretrained(str(tmp_path / "nowhere"))


def test_kernels_that_cannot_run_are_refused(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(InputError, match="kernels is 'triton' and the device is a CPU"):
        Engine.from_pretrained(str(tiny_folder), kernels="triton")
    with pytest.raises(InputError, match="kernels is 'cuda'; it must be one of auto, torch, triton"):
        EngineConfig(kernels="cuda")
