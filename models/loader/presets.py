"""Configs of common models by name, from their published config.json."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import ModelConfig
from .resolve import resolve_folder

if TYPE_CHECKING:
    from collections.abc import Callable


def _size_config(
    hidden_size: int, intermediate_size: int, num_layers: int, num_heads: int, num_kv_heads: int
) -> dict[str, Any]:
    return {
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "torch_dtype": "bfloat16",
    }


def _llama3_rope_config(factor: float) -> dict[str, Any]:
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    return {"rope_scaling": scaling, "max_position_embeddings": 131_072}


LLAMA2 = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32_000,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}
LLAMA3 = LLAMA2 | {"vocab_size": 128_256, "max_position_embeddings": 8192, "rope_theta": 500_000.0}
LLAMA31 = LLAMA3 | _llama3_rope_config(8.0)
LLAMA32 = LLAMA3 | _llama3_rope_config(32.0) | {"tie_word_embeddings": True}
MISTRAL = {
    "architectures": ["MistralForCausalLM"],
    "vocab_size": 32_000,
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1_000_000.0,
    "sliding_window": None,
}
QWEN25 = {
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 151_936,
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "use_sliding_window": False,
}
QWEN25_LARGE = QWEN25 | {"vocab_size": 152_064}
QWEN3 = QWEN25 | {
    "architectures": ["Qwen3ForCausalLM"],
    "head_dim": 128,
    "max_position_embeddings": 40_960,
}
TIED = {"tie_word_embeddings": True}

PRESETS: dict[str, dict[str, Any]] = {
    "llama-2-7b": LLAMA2 | _size_config(4096, 11_008, 32, 32, 32) | {"torch_dtype": "float16"},
    "llama-3-8b": LLAMA3 | _size_config(4096, 14_336, 32, 32, 8),
    "llama-3.1-8b": LLAMA31 | _size_config(4096, 14_336, 32, 32, 8),
    "llama-3.1-70b": LLAMA31 | _size_config(8192, 28_672, 80, 64, 8),
    "llama-3.2-1b": LLAMA32 | _size_config(2048, 8192, 16, 32, 8),
    "llama-3.2-3b": LLAMA32 | _size_config(3072, 8192, 28, 24, 8),
    "mistral-7b-v0.1": MISTRAL
    | _size_config(4096, 14_336, 32, 32, 8)
    | {"rope_theta": 10_000.0, "sliding_window": 4096},
    "mistral-7b-v0.2": MISTRAL | _size_config(4096, 14_336, 32, 32, 8),
    "mistral-7b-v0.3": MISTRAL | _size_config(4096, 14_336, 32, 32, 8) | {"vocab_size": 32_768},
    "qwen2.5-0.5b": QWEN25 | TIED | _size_config(896, 4864, 24, 14, 2),
    "qwen2.5-1.5b": QWEN25 | TIED | _size_config(1536, 8960, 28, 12, 2),
    "qwen2.5-3b": QWEN25 | TIED | _size_config(2048, 11_008, 36, 16, 2),
    "qwen2.5-7b": QWEN25_LARGE | _size_config(3584, 18_944, 28, 28, 4),
    "qwen2.5-14b": QWEN25_LARGE | _size_config(5120, 13_824, 48, 40, 8),
    "qwen2.5-32b": QWEN25_LARGE | _size_config(5120, 27_648, 64, 40, 8),
    "qwen2.5-72b": QWEN25_LARGE | _size_config(8192, 29_568, 80, 64, 8),
    "qwen3-0.6b": QWEN3 | TIED | _size_config(1024, 3072, 28, 16, 8),
    "qwen3-1.7b": QWEN3 | TIED | _size_config(2048, 6144, 28, 16, 8),
    "qwen3-4b": QWEN3 | TIED | _size_config(2560, 9728, 36, 32, 8),
    "qwen3-8b": QWEN3 | _size_config(4096, 12_288, 36, 32, 8),
    "qwen3-14b": QWEN3 | _size_config(5120, 17_408, 40, 40, 8),
    "qwen3-32b": QWEN3 | _size_config(5120, 25_600, 64, 64, 8),
    "smollm2-135m": LLAMA2
    | TIED
    | _size_config(576, 1536, 30, 9, 3)
    | {"vocab_size": 49_152, "max_position_embeddings": 8192, "rope_theta": 100_000.0},
}


def resolve_config(
    model: str, progress: Callable[[int, int], None] | None = None, dtype: str = "auto"
) -> tuple[ModelConfig, Path | None]:
    """Return a model's config and folder; the folder is None for a name in PRESETS.

    An existing folder takes precedence over a preset; a .gguf file is converted to `dtype`. Raises as
    `resolve_folder` when the model does not exist.
    """
    if model in PRESETS and not Path(model).is_dir():
        return ModelConfig.from_dict(PRESETS[model]), None
    folder = resolve_folder(model, progress, dtype)
    return ModelConfig.from_folder(folder), folder
