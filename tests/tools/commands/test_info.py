"""`trimtab info`, `pull` and `convert`."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from trimtab.kernels.common.errors import RunError
from trimtab.models.common import memory
from trimtab.models.gguf import convert
from trimtab.models.loader import download
from trimtab.tools.commands import convert as convert_command
from trimtab.tools.commands import info

from ..conftest import CommandResult

Run = Callable[..., CommandResult]

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 11,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 4096,
    "torch_dtype": "bfloat16",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    tensors = {"a": torch.zeros(3, 5, dtype=torch.bfloat16), "b": torch.zeros(7, dtype=torch.float32)}
    save_file(tensors, tmp_path / "model.safetensors")
    return tmp_path


@pytest.fixture(autouse=True)
def small_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with 20 GiB free."""
    monkeypatch.setattr(memory, "free_memory", lambda device: 20 * 1024**3)


def test_info_counts_stored_weights_and_kv_cache_bytes_per_token(run: Run, folder: Path) -> None:
    ran = run("info", str(folder), "--json")
    assert (ran.status, ran.stderr, ran.stdout.count("\n")) == (0, "", 1)
    assert json.loads(ran.stdout) == {
        "folder": str(folder),
        "architecture": "LlamaForCausalLM",
        "parameters": 3 * 5 + 7,
        "layers": 3,
        "hidden_size": 12,
        "heads": 6,
        "kv_heads": 2,
        "head_dim": 4,
        "context": 4096,
        "rope": {"kind": "default", "theta": 10000.0, "factor": 1.0},
        "sliding_window": None,
        "sliding_layers": 0,
        "dtype": "bfloat16",
        "weight_bytes": 15 * 2 + 7 * 4,
        "kv_bytes_per_token": 2 * 3 * 2 * 4 * 2,
        "kv_bytes_per_branch": 2 * 3 * 2 * 4 * 2 * 4096,
        "vocabulary": 11,
        "tokenizer": None,
        "chat_template": None,
        # embedding and LM head, final norm, three layers
        "memory_bytes": 2 * (2 * 11 * 12 + 12 + 3 * (2 * 12 * 24 + 2 * 12 * 8 + 3 * 12 * 20 + 2 * 12)),
        "free_bytes": 20 * 1024**3,
        "does_not_fit": [],
    }


def test_info_prints_one_value_per_line(run: Run, folder: Path) -> None:
    lines = run("info", str(folder)).stdout.splitlines()
    assert "parameters     22" in lines
    assert "context        4,096 tokens" in lines
    assert "rope           default, theta 10000" in lines
    assert "attention      to all previous tokens" in lines
    assert any(line.startswith("weights        58 bytes, ") and line.endswith(" in memory") for line in lines)
    assert "KV cache       96 bytes per token and branch, 384 KiB per branch of the full context" in lines
    assert "chat template  none" in lines
    assert "free memory    20 GiB" in lines
    assert not any(line.startswith("does not fit") for line in lines)


def test_info_names_the_tokenizer_and_the_template(run: Run, folder: Path) -> None:
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    data = json.loads(run("info", str(folder), "--json").stdout)
    assert (data["tokenizer"], data["chat_template"]) == ("BPE", "tokenizer_config.json")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    data = json.loads(run("info", str(folder), "--json").stdout)
    assert (data["tokenizer"], data["chat_template"]) == ("BPE", "chat_template.jinja")


def test_info_of_a_folder_without_weights_computes_their_size(run: Run, folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    data = json.loads(run("info", str(folder), "--json").stdout)
    assert data["weight_bytes"] == 2 * data["parameters"] == data["memory_bytes"]


def test_info_of_a_built_in_shape_reports_what_does_not_fit(run: Run) -> None:
    lines = run("info", "llama-3.1-70b").stdout.splitlines()
    assert "folder         none, a built-in shape" in lines
    assert "parameters     70,553,706,496" in lines
    assert "context        131,072 tokens" in lines
    assert "rope           llama3, theta 500000, factor 8" in lines
    assert "weights        131 GiB, 131 GiB in memory" in lines
    assert "KV cache       320 KiB per token and branch, 40 GiB per branch of the full context" in lines
    assert "tokenizer      none" in lines
    assert "does not fit   the weights: 131 GiB" in lines
    assert any(
        line.startswith("does not fit   a branch of the full context in the default") for line in lines
    )


def test_info_reports_sliding_windows_and_what_fits(run: Run) -> None:
    lines = run("info", "mistral-7b-v0.1").stdout.splitlines()
    assert "attention      a window of 4,096 tokens in 32 of 32 layers" in lines
    lines = run("info", "llama-3.1-8b").stdout.splitlines()
    assert "does not fit   the weights and a branch of the full context: 31 GiB" in lines


def test_info_of_a_folder_without_a_model_is_one_error_line(run: Run, tmp_path: Path) -> None:
    ran = run("info", str(tmp_path))
    assert (ran.status, ran.stdout, ran.stderr.count("\n")) == (2, "", 1)
    assert "config.json" in ran.stderr


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 bytes"), (1023, "1.02e+03 bytes"), (1536, "1.5 KiB"), (269030016, "257 MiB")]
)
def test_sizes_are_printed_with_units(count: int, text: str) -> None:
    assert info.format_bytes(count) == text


@pytest.mark.parametrize(
    ("dtype", "bits"), [("BF16", 16), ("F32", 32), ("F8_E4M3", 8), ("BOOL", 8), ("float16", 16)]
)
def test_the_bits_of_a_dtype_are_read_from_its_name(dtype: str, bits: int) -> None:
    assert info.dtype_bits(dtype) == bits


def test_pull_prints_the_folder(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download, "pull_demo", lambda progress: Path("the/folder"))
    assert run("pull", "demo") == CommandResult(0, "the/folder\n", "")


def test_pull_without_a_network_is_one_error_line_and_status_1(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(progress: Any) -> Path:
        raise RunError("cannot download the demo model: no network")

    monkeypatch.setattr(download, "pull_demo", offline)
    assert run("pull", "demo") == CommandResult(
        1, "", "trimtab: cannot download the demo model: no network\n"
    )


def test_convert_writes_the_folder_in_the_requested_dtype(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[Any] = []

    def fake_convert(path: Path, folder: Path, dtype: str, progress: Any) -> Path:
        called.append((path, folder, dtype))
        return folder

    monkeypatch.setattr(convert, "convert", fake_convert)
    assert run("convert", "a.gguf", "b") == CommandResult(0, "b\n", "")
    assert run("convert", "a.gguf", "b", "--dtype", "float16").status == 0
    assert called == [(Path("a.gguf"), Path("b"), "bfloat16"), (Path("a.gguf"), Path("b"), "float16")]


def test_convert_offers_the_dtypes_and_the_default_of_the_library_function() -> None:
    assert set(convert_command.DTYPES) == set(convert.DTYPES.values())
    assert convert_command.DTYPES[0] == inspect.signature(convert.convert).parameters["dtype"].default


@pytest.mark.parametrize("words", [["missing.gguf", "out"], ["missing.gguf", "out", "--dtype", "int3"]])
def test_convert_of_a_missing_file_is_one_error_line_and_status_2(
    run: Run, tmp_path: Path, words: list[str]
) -> None:
    ran = run("convert", str(tmp_path / words[0]), str(tmp_path / words[1]), *words[2:])
    assert (ran.status, ran.stdout, ran.stderr.count("\n")) == (2, "", 1)
    assert not (tmp_path / "out").exists()
