"""Qwen 3: norms of queries and keys, and sliding windows in some layers."""

from __future__ import annotations

from ..common.config_reader import ConfigReader
from .architecture import Architecture, size_config
from .gguf_format import GGUFFormat
from .sliding_window import windows_by_layer
from .switches import Switches

BASE = {
    "architectures": ["Qwen3ForCausalLM"],
    "vocab_size": 151_936,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "use_sliding_window": False,
}
TIED = BASE | {"tie_word_embeddings": True}


def _read_switches(reader: ConfigReader, num_layers: int) -> Switches:
    attention_bias = reader.get_bool("attention_bias")
    return Switches(
        sliding_windows=windows_by_layer(reader, num_layers),
        qkv_bias=attention_bias,
        output_bias=attention_bias,
        qk_norm=True,
    )


QWEN3 = Architecture(
    name="Qwen3ForCausalLM",
    context_length=32_768,
    num_kv_heads=32,
    head_dim=128,
    read_switches=_read_switches,
    gguf=GGUFFormat(
        name="qwen3",
        config={"attention_bias": False},
        window_config={"use_sliding_window": True, "max_window_layers": 0},
    ),
    presets={
        "qwen3-0.6b": TIED | size_config(1024, 3072, 28, 16, 8),
        "qwen3-1.7b": TIED | size_config(2048, 6144, 28, 16, 8),
        "qwen3-4b": TIED | size_config(2560, 9728, 36, 32, 8),
        "qwen3-8b": BASE | size_config(4096, 12_288, 36, 32, 8),
        "qwen3-14b": BASE | size_config(5120, 17_408, 40, 40, 8),
        "qwen3-32b": BASE | size_config(5120, 25_600, 64, 64, 8),
    },
)
