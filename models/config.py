"""Decoder configuration, read from a Hugging Face config.json and validated."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..kernels.common.errors import InputError, short_repr
from .common.config_reader import ConfigReader, config_error
from .common.json_files import require_small_file
from .layers.rotary_embedding import Rope
from .rope_parameters import parse_rope

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

MAX_LAYERS, MAX_LABELS = 1 << 12, 1 << 12
DEFAULT_WINDOW = 4096
SLIDING_ATTENTION, FULL_ATTENTION = "sliding_attention", "full_attention"
CAUSAL_LM, SEQUENCE_CLASSIFICATION = "ForCausalLM", "ForSequenceClassification"
"""Suffixes of architecture names, by the kind of head."""


@dataclass(frozen=True)
class ArchDefaults:
    """Properties fixed by an architecture, and transformers' defaults for keys that config.json omits.

    num_kv_heads, head_dim: None where they follow from the other sizes. bias_flags: the bias keys of
    config.json that the architecture reads. sliding: whether all layers use sliding-window attention; None
    where config.json selects the layers.
    """

    context_length: int
    num_kv_heads: int | None = None
    head_dim: int | None = None
    qkv_bias: bool = False
    bias_flags: tuple[str, ...] = ()
    qk_norm: bool = False
    sliding: bool | None = False


ARCHITECTURES = {
    "LlamaForCausalLM": ArchDefaults(context_length=2048, bias_flags=("attention_bias", "mlp_bias")),
    "MistralForCausalLM": ArchDefaults(context_length=131_072, num_kv_heads=8, sliding=True),
    "Qwen2ForCausalLM": ArchDefaults(context_length=32_768, num_kv_heads=32, qkv_bias=True, sliding=None),
    "Qwen3ForCausalLM": ArchDefaults(
        context_length=32_768,
        num_kv_heads=32,
        head_dim=128,
        bias_flags=("attention_bias",),
        qk_norm=True,
        sliding=None,
    ),
}


@dataclass(frozen=True)
class ModelConfig:
    """A Llama-family decoder's sizes and switches.

    qkv_bias, output_bias: biases of the attention projections; mlp_bias: of the three MLP projections.
    qk_norm: queries and keys are RMS-normalised per head, before rotary embedding.
    sliding_windows: per layer, how many tokens a token attends to, itself included; None is all before it.
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
    sliding_windows: tuple[int | None, ...]
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
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
        architecture = _read_architecture(data)
        defaults, reader = ARCHITECTURES[_causal_lm_name(architecture)], ConfigReader(data)
        _reject_unsupported(reader)
        hidden_size, num_heads = reader.get_int("hidden_size"), reader.get_int("num_attention_heads")
        num_kv_heads = _read_num_kv_heads(reader, defaults, num_heads)
        head_dim = reader.get_int("head_dim", defaults.head_dim or hidden_size // num_heads)
        if num_heads % num_kv_heads:
            raise config_error(
                "num_attention_heads", num_heads, f"num_key_value_heads {num_kv_heads} must divide it"
            )
        if head_dim % 2:
            raise config_error("head_dim", head_dim, "it must be even for rotary embedding")
        num_layers = reader.get_int("num_hidden_layers", max_value=MAX_LAYERS)
        context_length = reader.get_int("max_position_embeddings", defaults.context_length)
        enabled_biases = {key for key in defaults.bias_flags if reader.get_bool(key)}
        labels = _read_labels(reader) if architecture.endswith(SEQUENCE_CLASSIFICATION) else ()
        return cls(
            architecture=architecture,
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
            sliding_windows=_read_sliding_windows(reader, defaults, num_layers),
            qkv_bias=defaults.qkv_bias or "attention_bias" in enabled_biases,
            output_bias="attention_bias" in enabled_biases,
            mlp_bias="mlp_bias" in enabled_biases,
            qk_norm=defaults.qk_norm,
            tie_word_embeddings=reader.get_bool("tie_word_embeddings") and not labels,
            dtype=_read_dtype(reader),
            labels=labels,
        )

    @property
    def context_length(self) -> int:
        """The maximum tokens of prompt and answer together, including RoPE scaling."""
        return self.rope.context_length(self.max_position_embeddings)

    @property
    def kv_elements_per_token(self) -> int:
        """KV cache elements per token of one branch, over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim


def _read_architecture(data: Mapping[str, Any]) -> str:
    """Return the architecture from `architectures`, or else from `model_type`, such as "llama"."""
    by_model_type = {name.removesuffix(CAUSAL_LM).lower(): name for name in ARCHITECTURES}
    model_type = data.get("model_type")
    value = data.get("architectures") or by_model_type.get(str(model_type), model_type)
    name = value[0] if isinstance(value, list) else value
    if not isinstance(name, str) or _causal_lm_name(name) not in ARCHITECTURES:
        raise InputError(
            f"architecture {short_repr(name)} is not supported; expected one of {', '.join(ARCHITECTURES)}, "
            f"or for reward models the same ending in {SEQUENCE_CLASSIFICATION}"
        )
    return name


def _causal_lm_name(architecture: str) -> str:
    """The causal LM with the same layers: LlamaForSequenceClassification → LlamaForCausalLM."""
    stem = architecture.removesuffix(SEQUENCE_CLASSIFICATION)
    return architecture if stem == architecture else stem + CAUSAL_LM


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


def _reject_unsupported(reader: ConfigReader) -> None:
    quantization = reader.get_dict("quantization_config")
    if quantization:
        raise InputError(
            f"config.json has quantization_config with quant_method "
            f"{short_repr(quantization.get('quant_method'))}, "
            "which is not supported; a checkpoint must be in float32, float16 or bfloat16"
        )
    activation = reader.data.get("hidden_act", "silu")
    if activation != "silu":
        raise config_error("hidden_act", activation, "only 'silu' is supported")


def _read_num_kv_heads(reader: ConfigReader, defaults: ArchDefaults, num_heads: int) -> int:
    """Null means multi-head attention; a missing key, the architecture's default."""
    absent = "num_key_value_heads" not in reader.data
    return reader.get_int(
        "num_key_value_heads", defaults.num_kv_heads if absent and defaults.num_kv_heads else num_heads
    )


def _read_sliding_windows(
    reader: ConfigReader, defaults: ArchDefaults, num_layers: int
) -> tuple[int | None, ...]:
    """The window of each layer."""
    sliding = defaults.sliding if defaults.sliding is not None else reader.get_bool("use_sliding_window")
    has_window = sliding and reader.data.get("sliding_window", DEFAULT_WINDOW) is not None
    window = reader.get_int("sliding_window", DEFAULT_WINDOW) if has_window else None
    if defaults.sliding is not None:
        return (window,) * num_layers
    first_sliding = reader.get_int("max_window_layers", 28, min_value=0)
    layer_types = reader.data.get("layer_types") or [
        SLIDING_ATTENTION if window and i >= first_sliding else FULL_ATTENTION for i in range(num_layers)
    ]
    if (
        not isinstance(layer_types, list)
        or len(layer_types) != num_layers
        or any(t not in (SLIDING_ATTENTION, FULL_ATTENTION) for t in layer_types)
    ):
        raise config_error(
            "layer_types",
            layer_types,
            f"it must list {SLIDING_ATTENTION!r} or {FULL_ATTENTION!r} for each of {num_layers} layers",
        )
    if SLIDING_ATTENTION in layer_types and window is None:
        raise config_error(
            "layer_types",
            layer_types,
            "sliding_attention layers need use_sliding_window and sliding_window",
        )
    return tuple(window if layer_type == SLIDING_ATTENTION else None for layer_type in layer_types)
