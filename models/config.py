"""Decoder configuration, read from a Hugging Face config.json and validated."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..kernels.common.errors import InputError, short_repr
from .architectures.architecture import SEQUENCE_CLASSIFICATION
from .architectures.switches import Switches
from .common.config_reader import ConfigReader, config_error
from .common.json_files import require_small_file
from .layers.rope_parameters import parse_rope
from .layers.rotary_embedding import Rope
from .registry import find_architecture

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from .architectures.architecture import Architecture

MAX_LAYERS, MAX_LABELS = 1 << 12, 1 << 12


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Switches):
    """A decoder's sizes, and its `Switches`.

    dtype: the checkpoint's dtype, "float32" when config.json omits it.
    labels: a classifier's label names, one for each output of its head; () for a causal language model.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: Rope
    max_position_embeddings: int
    tie_word_embeddings: bool
    dtype: str
    labels: tuple[str, ...] = ()

    @classmethod
    def from_folder(cls, folder: Path) -> ModelConfig:
        """Read `folder`/config.json. Raises InputError when it is missing, invalid JSON, or not supported."""
        path = folder / "config.json"
        if not os.path.lexists(path):
            raise InputError(f"{str(folder)!r} has no config.json; expected a model folder")
        require_small_file(path)
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{str(path)!r} cannot be read as JSON: {error}") from None
        if not isinstance(data, dict):
            raise InputError(f"{str(path)!r} is not a JSON object")
        return cls.from_dict(data)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelConfig:
        """Parse the keys of a config.json, as written by transformers 4 or 5."""
        name, family = find_architecture(data)
        reader = ConfigReader(data)
        _reject_quantized(reader)
        activation = family.read_activation(reader)
        hidden_size, num_heads = reader.get_int("hidden_size"), reader.get_int("num_attention_heads")
        num_kv_heads = _read_num_kv_heads(reader, family, num_heads)
        head_dim = reader.get_int("head_dim", family.head_dim or hidden_size // num_heads)
        if num_heads % num_kv_heads:
            raise config_error(
                "num_attention_heads", num_heads, f"num_key_value_heads {num_kv_heads} must divide it"
            )
        if head_dim % 2:
            raise config_error("head_dim", head_dim, "it must be even for rotary embedding")
        num_layers = reader.get_int("num_hidden_layers", max_value=MAX_LAYERS)
        context_length = reader.get_int("max_position_embeddings", family.context_length)
        labels = _read_labels(reader) if name.endswith(SEQUENCE_CLASSIFICATION) else ()
        switches = replace(family.read_switches(reader, num_layers), activation=activation)
        return cls(
            **vars(switches),
            architecture=name,
            vocab_size=reader.get_int("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=reader.get_int("intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rms_norm_eps=reader.get_float("rms_norm_eps", 1e-6, 1e-20, 1),
            rope=parse_rope(reader, context_length, head_dim),
            max_position_embeddings=context_length,
            tie_word_embeddings=reader.get_bool("tie_word_embeddings") and not labels,
            dtype=_read_dtype(reader),
            labels=labels,
        )

    @property
    def context_length(self) -> int:
        """The maximum tokens of prompt and answer together, including RoPE scaling."""
        return self.rope.context_length(self.max_position_embeddings)

    @property
    def query_scale(self) -> float:
        """The factor of the attention scores, with which queries are multiplied."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale

    @property
    def kv_elements_per_token(self) -> int:
        """KV cache elements per token of one branch, over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim


def _read_labels(reader: ConfigReader) -> tuple[str, ...]:
    """Label names from id2label, or LABEL_0, LABEL_1, …; two labels by default, as in transformers."""
    id2label = reader.get_dict("id2label")
    num_labels = reader.get_int("num_labels", len(id2label) or 2, max_value=MAX_LABELS)
    return tuple(str(id2label.get(str(index), f"LABEL_{index}")) for index in range(num_labels))


def _read_dtype(reader: ConfigReader) -> str:
    key = "dtype" if reader.has("dtype") else "torch_dtype"
    value = reader.data.get(key) or "float32"
    if not isinstance(value, str):
        raise config_error(key, value, "it must be the name of a dtype, such as 'bfloat16'")
    return value


def _reject_quantized(reader: ConfigReader) -> None:
    quantization = reader.get_dict("quantization_config")
    if quantization:
        raise InputError(
            f"config.json has quantization_config with quant_method "
            f"{short_repr(quantization.get('quant_method'))}, "
            "which is not supported; a checkpoint must be in float32, float16 or bfloat16"
        )


def _read_num_kv_heads(reader: ConfigReader, family: Architecture, num_heads: int) -> int:
    """Null means multi-head attention; a missing key, the architecture's default."""
    absent = "num_key_value_heads" not in reader.data
    return reader.get_int(
        "num_key_value_heads", family.num_kv_heads if absent and family.num_kv_heads else num_heads
    )
