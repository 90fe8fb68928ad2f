"""Llama 2 and 3, and models with the same config.json, such as SmolLM2."""

from __future__ import annotations

from typing import Any

from ..common.config_reader import ConfigReader
from .architecture import Architecture, size_config
from .gguf_format import GGUFFormat
from .sliding_window import no_windows
from .switches import Switches


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


def _read_switches(reader: ConfigReader, num_layers: int) -> Switches:
    attention_bias = reader.get_bool("attention_bias")
    return Switches(
        sliding_windows=no_windows(num_layers),
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        mlp_bias=reader.get_bool("mlp_bias"),
    )


LLAMA = Architecture(
    name="LlamaForCausalLM",
    context_length=2048,
    read_switches=_read_switches,
    gguf=GGUFFormat(
        name="llama",
        config={"attention_bias": False, "mlp_bias": False},
        window_config={"architectures": ["MistralForCausalLM"], "model_type": "mistral"},
        interleaved=True,
    ),
    presets={
        "llama-2-7b": LLAMA2 | size_config(4096, 11_008, 32, 32, 32) | {"torch_dtype": "float16"},
        "llama-3-8b": LLAMA3 | size_config(4096, 14_336, 32, 32, 8),
        "llama-3.1-8b": LLAMA31 | size_config(4096, 14_336, 32, 32, 8),
        "llama-3.1-70b": LLAMA31 | size_config(8192, 28_672, 80, 64, 8),
        "llama-3.2-1b": LLAMA32 | size_config(2048, 8192, 16, 32, 8),
        "llama-3.2-3b": LLAMA32 | size_config(3072, 8192, 28, 24, 8),
        "smollm2-135m": LLAMA2
        | {"tie_word_embeddings": True}
        | size_config(576, 1536, 30, 9, 3)
        | {"vocab_size": 49_152, "max_position_embeddings": 8192, "rope_theta": 100_000.0},
    },
)
