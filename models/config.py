"""The shape of a decoder, read from a Hugging Face config.json and checked."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..kernels.common.errors import InputError, quoted
from .common.config_reader import Fields, wrong
from .common.json_files import readable
from .layers.rotary_embedding import Rope
from .rope_parameters import read_rope

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

MAX_LAYERS, MAX_LABELS = 1 << 12, 1 << 12
DEFAULT_WINDOW = 4096
SLIDING, FULL = "sliding_attention", "full_attention"
CAUSAL, CLASSIFIER = "ForCausalLM", "ForSequenceClassification"
"""Of an architecture's name: what its head is for."""


@dataclass(frozen=True)
class Family:
    """What an architecture decides, and what transformers takes for a key that config.json leaves out.

    kv_heads, head_dim: None where they follow from the other sizes. may_bias: the switches of config.json
    that count. slides: whether attention has a window in all layers; None where config.json chooses layers.
    """

    context: int
    kv_heads: int | None = None
    head_dim: int | None = None
    qkv_bias: bool = False
    may_bias: tuple[str, ...] = ()
    qk_norm: bool = False
    slides: bool | None = False


FAMILIES = {
    "LlamaForCausalLM": Family(context=2048, may_bias=("attention_bias", "mlp_bias")),
    "MistralForCausalLM": Family(context=131_072, kv_heads=8, slides=True),
    "Qwen2ForCausalLM": Family(context=32_768, kv_heads=32, qkv_bias=True, slides=None),
    "Qwen3ForCausalLM": Family(
        context=32_768,
        kv_heads=32,
        head_dim=128,
        may_bias=("attention_bias",),
        qk_norm=True,
        slides=None,
    ),
}


@dataclass(frozen=True)
class ModelConfig:
    """A Llama-family decoder's sizes and switches.

    qkv_bias, output_bias: of the attention's products; mlp_bias: of the feed-forward's three.
    qk_norm: queries and keys are normalised within each head, before they are turned.
    windows: for each layer how many tokens a token sees, itself included; None is all before it.
    dtype: that of the checkpoint, "float32" when it does not say.
    labels: of a classifier, what its head gives a number for; () for a model that writes.
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
    windows: tuple[int | None, ...]
    qkv_bias: bool
    output_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tie_word_embeddings: bool
    dtype: str
    labels: tuple[str, ...] = ()

    @classmethod
    def from_folder(cls, folder: Path) -> ModelConfig:
        """Reads `folder`/config.json. Raises InputError when it is missing, no JSON, or not such a model."""
        path = folder / "config.json"
        if not os.path.lexists(path):
            raise InputError(f"{str(folder)!r} has no config.json; a model is a folder with one")
        readable(path)
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{str(path)!r} cannot be read as JSON: {error}") from None
        if not isinstance(data, dict):
            raise InputError(f"{str(path)!r} holds no JSON object; a model's config.json is one")
        return cls.from_dict(data)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelConfig:
        """Reads the keys of a config.json, in the spelling of transformers 4 or 5."""
        architecture = _architecture(data)
        family, config = FAMILIES[_causal(architecture)], Fields(data)
        _refuse_unsupported(config)
        hidden, heads = config.size("hidden_size"), config.size("num_attention_heads")
        kv_heads = _kv_heads(config, family, heads)
        head_dim = config.size("head_dim", family.head_dim or hidden // heads)
        if heads % kv_heads:
            raise wrong("num_attention_heads", heads, f"num_key_value_heads {kv_heads} must divide it")
        if head_dim % 2:
            raise wrong("head_dim", head_dim, "rotary embedding needs an even one")
        layers = config.size("num_hidden_layers", most=MAX_LAYERS)
        context = config.size("max_position_embeddings", family.context)
        biased = {key for key in family.may_bias if config.flag(key)}
        labels = _labels(config) if architecture.endswith(CLASSIFIER) else ()
        return cls(
            architecture=architecture,
            vocab_size=config.size("vocab_size"),
            hidden_size=hidden,
            intermediate_size=config.size("intermediate_size"),
            num_layers=layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=config.number("rms_norm_eps", 1e-6, 1e-20, 1),
            rope=read_rope(config, context, head_dim),
            max_position_embeddings=context,
            windows=_windows(config, family, layers),
            qkv_bias=family.qkv_bias or "attention_bias" in biased,
            output_bias="attention_bias" in biased,
            mlp_bias="mlp_bias" in biased,
            qk_norm=family.qk_norm,
            tie_word_embeddings=config.flag("tie_word_embeddings") and not labels,
            dtype=_dtype(config),
            labels=labels,
        )

    @property
    def context(self) -> int:
        """The longest prompt and answer together: what the model was trained for, or is scaled to."""
        return self.rope.context(self.max_position_embeddings)

    @property
    def kv_size(self) -> int:
        """Numbers that one token adds to the KV cache of one branch, over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim


def _architecture(data: Mapping[str, Any]) -> str:
    """By its name, or where config.json names none by its model_type, such as "llama"."""
    named = {name.removesuffix(CAUSAL).lower(): name for name in FAMILIES}
    kind = data.get("model_type")
    found = data.get("architectures") or named.get(str(kind), kind)
    name = found[0] if isinstance(found, list) else found
    if not isinstance(name, str) or _causal(name) not in FAMILIES:
        raise InputError(
            f"architecture {quoted(name)} is not supported; known are {', '.join(FAMILIES)}, and for reward "
            f"models the same with {CLASSIFIER}"
        )
    return name


def _causal(architecture: str) -> str:
    """The one that writes with the same layers: LlamaForSequenceClassification → LlamaForCausalLM."""
    stem = architecture.removesuffix(CLASSIFIER)
    return architecture if stem == architecture else stem + CAUSAL


def _labels(config: Fields) -> tuple[str, ...]:
    """Named by id2label, where it does; without it transformers takes two."""
    named = config.object("id2label")
    count = config.size("num_labels", len(named) or 2, most=MAX_LABELS)
    return tuple(str(named.get(str(index), f"LABEL_{index}")) for index in range(count))


def _dtype(config: Fields) -> str:
    key = "dtype" if config.has("dtype") else "torch_dtype"
    value = config.data.get(key) or "float32"
    if not isinstance(value, str):
        raise wrong(key, value, "it must be a type's name, such as 'bfloat16'")
    return value


def _refuse_unsupported(config: Fields) -> None:
    quantised = config.object("quantization_config")
    if quantised:
        raise InputError(
            f"config.json has quantization_config with quant_method {quoted(quantised.get('quant_method'))}, "
            "which is not supported; a checkpoint must be in float32, float16 or bfloat16"
        )
    activation = config.data.get("hidden_act", "silu")
    if activation != "silu":
        raise wrong("hidden_act", activation, "only 'silu' is supported")


def _kv_heads(config: Fields, family: Family, heads: int) -> int:
    """A null means a key and value for every query; a key that is left out, what the family takes."""
    absent = "num_key_value_heads" not in config.data
    return config.size("num_key_value_heads", family.kv_heads if absent and family.kv_heads else heads)


def _windows(config: Fields, family: Family, layers: int) -> tuple[int | None, ...]:
    """The window of each layer."""
    slides = family.slides if family.slides is not None else config.flag("use_sliding_window")
    wanted = slides and config.data.get("sliding_window", DEFAULT_WINDOW) is not None
    window = config.size("sliding_window", DEFAULT_WINDOW) if wanted else None
    if family.slides is not None:
        return (window,) * layers
    first = config.size("max_window_layers", 28, least=0)
    types = config.data.get("layer_types") or [
        SLIDING if window and i >= first else FULL for i in range(layers)
    ]
    if not isinstance(types, list) or len(types) != layers or any(t not in (SLIDING, FULL) for t in types):
        raise wrong("layer_types", types, f"it must list {SLIDING!r} or {FULL!r} for each of {layers} layers")
    if SLIDING in types and window is None:
        raise wrong(
            "layer_types", types, "with layers that slide, use_sliding_window and a sliding_window are needed"
        )
    return tuple(window if kind == SLIDING else None for kind in types)
