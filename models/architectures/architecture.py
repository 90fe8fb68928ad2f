"""What a model family states: its name in config.json, defaults, switches, GGUF format and presets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..common.config_reader import ConfigReader, config_error
from .gguf_format import GGUFFormat
from .switches import Activation, Switches

CAUSAL_LM, SEQUENCE_CLASSIFICATION = "ForCausalLM", "ForSequenceClassification"
"""Suffixes of architecture names, by the kind of head."""
ACTIVATIONS: dict[str, Activation] = {"silu": "silu", "gelu_pytorch_tanh": "gelu_tanh"}
"""The activations of the gated MLP, by their names in config.json."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """A family of decoders with the same config.json.

    name: its causal language model in config.json, such as LlamaForCausalLM. classifier: whether
    transformers has the same ending in ForSequenceClassification.
    context_length, num_kv_heads, head_dim: what transformers takes for keys that config.json leaves out; None
    where they follow from the other sizes. activations: values of hidden_act that it may have, the default
    first. read_switches: makes the switches of a config.json and its number of layers.
    gguf: how GGUF files store it, None where they have no name of their own for it. presets: common models by
    name, with the keys of their published config.json.
    """

    name: str
    context_length: int
    read_switches: Callable[[ConfigReader, int], Switches]
    classifier: bool = True
    num_kv_heads: int | None = None
    head_dim: int | None = None
    activations: tuple[str, ...] = ("silu",)
    gguf: GGUFFormat | None = None
    presets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def model_type(self) -> str:
        """Its model_type in config.json."""
        return self.name.removesuffix(CAUSAL_LM).lower()

    @property
    def names(self) -> tuple[str, ...]:
        """The values of `architectures` that it runs."""
        stem = self.name.removesuffix(CAUSAL_LM)
        return (self.name, stem + SEQUENCE_CLASSIFICATION) if self.classifier else (self.name,)

    def read_activation(self, reader: ConfigReader) -> Activation:
        """The MLP's activation. Raises InputError for one that the family does not have."""
        value = reader.data.get("hidden_act", self.activations[0])
        if value not in self.activations:
            supported = " or ".join(map(repr, self.activations))
            raise config_error("hidden_act", value, f"only {supported} is supported")
        return ACTIVATIONS[value]


def size_config(
    hidden_size: int, intermediate_size: int, num_layers: int, num_heads: int, num_kv_heads: int
) -> dict[str, Any]:
    """The sizes of a preset, in bfloat16."""
    return {
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads,
        "torch_dtype": "bfloat16",
    }
