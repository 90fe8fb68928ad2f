"""Mistral 7B: Llama with a sliding window in every layer. GGUF files call it llama."""

from __future__ import annotations

from ..common.config_reader import ConfigReader
from .architecture import Architecture, size_config
from .sliding_window import same_window
from .switches import Switches

BASE = {
    "architectures": ["MistralForCausalLM"],
    "vocab_size": 32_000,
    "max_position_embeddings": 32_768,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1_000_000.0,
    "sliding_window": None,
} | size_config(4096, 14_336, 32, 32, 8)


def _read_switches(reader: ConfigReader, num_layers: int) -> Switches:
    return Switches(sliding_windows=same_window(reader, num_layers))


MISTRAL = Architecture(
    name="MistralForCausalLM",
    context_length=131_072,
    num_kv_heads=8,
    read_switches=_read_switches,
    presets={
        "mistral-7b-v0.1": BASE | {"rope_theta": 10_000.0, "sliding_window": 4096},
        "mistral-7b-v0.2": BASE,
        "mistral-7b-v0.3": BASE | {"vocab_size": 32_768},
    },
)
