"""RoPE scaling converted from GGUF files matches the original model."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from transformers import AutoConfig, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from trimtab.kernels.common.errors import InputError
from trimtab.models.gguf.convert import convert
from trimtab.models.gguf.rope_scaling import TOLERANCE

from ...helpers.gguf_files import random_tensors, write_gguf

if TYPE_CHECKING:
    from pathlib import Path

THETA = 500_000.0


def convert_scaling(path: Path) -> Any:
    folder = convert(path, path.parent / "out")
    return json.loads((folder / "config.json").read_text()).get("rope_scaling")


@pytest.mark.parametrize(
    ("scaling", "right"),
    [
        ({}, None),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 4.0}, None),
        ({"rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"rope.scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        (
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 32,
            },
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        ),
        (
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 2.0,
                "rope.scaling.yarn_beta_fast": 16.0,
                "rope.scaling.yarn_beta_slow": 2.0,
                "rope.scaling.yarn_attn_factor": 1.25,
                "rope.scaling.yarn_ext_factor": 1.0,
                "rope.scaling.attn_factor": 1.0,
            },
            {
                "rope_type": "yarn",
                "factor": 2.0,
                "original_max_position_embeddings": 128,
                "beta_fast": 16.0,
                "beta_slow": 2.0,
                "attention_factor": 1.25,
            },
        ),
    ],
)
@pytest.mark.parametrize("architecture", ["llama", "qwen2"])
def test_scaling_in_the_metadata_is_converted(
    tmp_path: Path, architecture: str, scaling: dict[str, Any], right: object
) -> None:
    metadata = {f"{architecture}.{key}": value for key, value in scaling.items()}
    assert convert_scaling(write_gguf(tmp_path / "m.gguf", metadata, architecture=architecture)) == right


def llama3_divisors(width: int, factor: float, low: float, high: float, original: int) -> np.ndarray:
    """rope_freqs.weight as llama.cpp's converter computes it, in float32."""
    divisors = []
    for frequency in 1.0 / (THETA ** (torch.arange(0, width, 2, dtype=torch.float32) / width)):
        wavelength = float(2 * math.pi / frequency)
        smooth = (original / wavelength - low) / (high - low)
        if wavelength < original / high:
            divisors.append(1.0)
        elif wavelength > original / low:
            divisors.append(factor)
        else:
            divisors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(divisors, np.float32)


def with_divisors(path: Path, values: np.ndarray, width: int) -> Path:
    lengths = ("attention.key_length", "attention.value_length", "rope.dimension_count")
    metadata = {**{f"llama.{key}": width for key in lengths}, "llama.rope.freq_base": THETA}
    contents = {**random_tensors("F16", head_dim=width), "rope_freqs.weight": (values, Kind.F32)}
    return write_gguf(path, metadata, contents)


PUBLISHED = {"3.1": (8.0, 1.0, 4.0, 8192), "3.2": (32.0, 1.0, 4.0, 8192)}


@pytest.mark.parametrize("width", [16, 64, 128])
@pytest.mark.parametrize("version", PUBLISHED)
def test_llama_3_scaling_is_recovered_from_its_tensor(tmp_path: Path, version: str, width: int) -> None:
    values = llama3_divisors(width, *PUBLISHED[version])
    factor, low, high, original = PUBLISHED[version]
    assert convert_scaling(with_divisors(tmp_path / "m.gguf", values, width)) == {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": original,
    }


@pytest.mark.parametrize(
    "parameters",
    [(8.0, 1.0, 4.0, 8192), (32.0, 1.0, 4.0, 8192), (4.0, 1.0, 32.0, 2048), (16.0, 2.5, 9.0, 6000)],
)
def test_frequencies_match_the_original_model(
    tmp_path: Path, parameters: tuple[float, float, float, int]
) -> None:
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    scaling = {"rope_type": "llama3", "rope_theta": THETA, **dict(zip(names, parameters, strict=True))}
    config = LlamaConfig(hidden_size=512, num_attention_heads=4, rope_parameters=scaling)
    right = LlamaRotaryEmbedding(config).inv_freq
    plain = LlamaConfig(
        hidden_size=512, num_attention_heads=4, rope_parameters={"rope_theta": THETA, "rope_type": "default"}
    )
    values = (LlamaRotaryEmbedding(plain).inv_freq / right).numpy()
    folder = convert(with_divisors(tmp_path / "m.gguf", values, 128), tmp_path / "out")
    converted = LlamaRotaryEmbedding(AutoConfig.from_pretrained(folder)).inv_freq
    torch.testing.assert_close(converted, right, rtol=TOLERANCE * parameters[0], atol=0)
    assert not torch.equal(right, LlamaRotaryEmbedding(plain).inv_freq)


def test_divisors_of_one_mean_unscaled_rope(tmp_path: Path) -> None:
    assert convert_scaling(with_divisors(tmp_path / "m.gguf", np.ones(32, np.float32), 64)) is None


BENT_DIVISORS = llama3_divisors(64, *PUBLISHED["3.1"])
BENT_DIVISORS[15] *= 1.0001
REFUSED: dict[str, tuple[np.ndarray, str]] = {
    "one changed divisor": (BENT_DIVISORS, "does not match Llama 3.1's scaling"),
    "linear divisors": (np.linspace(1, 8, 32, dtype=np.float32), "does not match Llama 3.1's scaling"),
    "too few": (np.ones(31, np.float32), r"has shape \[31\]; expected \[32\]"),
    "zero": (np.zeros(32, np.float32), "all values must be finite and at least 1"),
    "NaN": (np.full(32, np.nan, np.float32), "all values must be finite and at least 1"),
    "infinite": (np.full(32, np.inf, np.float32), "all values must be finite and at least 1"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_divisors_that_config_json_cannot_express_are_refused(tmp_path: Path, case: str) -> None:
    values, message = REFUSED[case]
    with pytest.raises(InputError, match=message) as refusal:
        convert(with_divisors(tmp_path / "m.gguf", values, 64), tmp_path / "out")
    assert "rope_freqs.weight" in str(refusal.value)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (
            {"rope.scaling.type": "longrope", "rope.scaling.factor": 2.0},
            "'longrope'; expected one of none, linear, yarn",
        ),
        ({"rope.scaling.attn_factor": 1.5}, "attn_factor is 1.5; only 1.0 is supported"),
        (
            {"rope.scaling.yarn_log_multiplier": 0.1, "rope.scaling.type": "yarn"},
            "yarn_log_multiplier is 0.1",
        ),
        ({"rope.scaling.factor": -1.0}, "factor is -1.0; it must be a number above 0"),
    ],
)
def test_unsupported_scaling_metadata_is_refused(
    tmp_path: Path, metadata: dict[str, Any], message: str
) -> None:
    path = write_gguf(tmp_path / "m.gguf", {f"llama.{key}": value for key, value in metadata.items()})
    with pytest.raises(InputError, match=message.replace(".", r"\.")):
        convert(path, tmp_path / "out")


def test_scaling_in_both_metadata_and_tensor_is_refused(tmp_path: Path) -> None:
    contents = {**random_tensors(), "rope_freqs.weight": (llama3_divisors(16, *PUBLISHED["3.1"]), Kind.F32)}
    path = write_gguf(
        tmp_path / "m.gguf", {"llama.rope.scaling.factor": 2.0, "llama.rope.freq_base": THETA}, contents
    )
    with pytest.raises(InputError, match=r"has RoPE scaling in both rope_freqs\.weight and its metadata"):
        convert(path, tmp_path / "out")
