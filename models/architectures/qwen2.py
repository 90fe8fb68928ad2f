"""Qwen 2 and 2.5: biases of queries, keys and values, and sliding windows in some layers."""

from __future__ import annotations

from ..common.config_reader import ConfigReader
from .architecture import Architecture, size_config
from .gguf_format import GGUFFormat
from .sliding_window import windows_by_layer
from .switches import Switches

BASE = {
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 151_936,
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "use_sliding_window": False,
}
TIED = BASE | {"tie_word_embeddings": True}
LARGE = BASE | {"vocab_size": 152_064}


def _read_switches(reader: ConfigReader, num_layers: int) -> Switches:
    return Switches(sliding_windows=windows_by_layer(reader, num_layers), qkv_bias=True)


QWEN2 = Architecture(
    name="Qwen2ForCausalLM",
    context_length=32_768,
    num_kv_heads=32,
    read_switches=_read_switches,
    gguf=GGUFFormat(name="qwen2", window_config={"use_sliding_window": True, "max_window_layers": 0}),
    presets={
        "qwen2.5-0.5b": TIED | size_config(896, 4864, 24, 14, 2),
        "qwen2.5-1.5b": TIED | size_config(1536, 8960, 28, 12, 2),
        "qwen2.5-3b": TIED | size_config(2048, 11_008, 36, 16, 2),
        "qwen2.5-7b": LARGE | size_config(3584, 18_944, 28, 28, 4),
        "qwen2.5-14b": LARGE | size_config(5120, 13_824, 48, 40, 8),
        "qwen2.5-32b": LARGE | size_config(5120, 27_648, 64, 40, 8),
        "qwen2.5-72b": LARGE | size_config(8192, 29_568, 80, 64, 8),
    },
)
