"""The shape of a decoder, read from a Hugging Face config.json and checked."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..kernels.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

ARCHITECTURES = ("LlamaForCausalLM",)
MAX_SIZE = 1 << 24
"""No real model has a dimension near this; a config that does is broken, and must not be allocated."""
MAX_LAYERS = 1 << 12


@dataclass(frozen=True)
class ModelConfig:
    """A Llama-family decoder's sizes. `dtype` is that of the checkpoint, "float32" when it does not say."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    dtype: str

    @classmethod
    def from_folder(cls, folder: Path) -> ModelConfig:
        """Reads `folder`/config.json. Raises InputError when it is missing, no JSON, or not such a model."""
        path = folder / "config.json"
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InputError(f"{str(folder)!r} has no config.json; a model is a folder with one") from None
        except (OSError, ValueError, RecursionError) as error:
            raise InputError(f"{str(path)!r} cannot be read as JSON: {error}") from None
        if not isinstance(data, dict):
            raise InputError(f"{str(path)!r} holds no JSON object; a model's config.json is one")
        return cls.from_dict(data)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelConfig:
        """Reads the keys of a config.json, in the spelling of transformers 4 or 5."""
        found = data.get("architectures") or [data.get("model_type", "none")]
        architecture = found[0] if isinstance(found, list) else found
        if architecture not in ARCHITECTURES:
            raise InputError(
                f"architecture {architecture!r} is not supported; known are {', '.join(ARCHITECTURES)}"
            )
        _refuse_unsupported(data)
        heads = _size(data, "num_attention_heads")
        hidden = _size(data, "hidden_size")
        config = cls(
            architecture=architecture,
            vocab_size=_size(data, "vocab_size"),
            hidden_size=hidden,
            intermediate_size=_size(data, "intermediate_size"),
            num_layers=_size(data, "num_hidden_layers", most=MAX_LAYERS),
            num_heads=heads,
            num_kv_heads=_size(data, "num_key_value_heads", heads),
            head_dim=_size(data, "head_dim", hidden // heads),
            rms_norm_eps=_positive(data, "rms_norm_eps", 1e-6),
            rope_theta=_positive({**data, **(data.get("rope_parameters") or {})}, "rope_theta", 10_000.0),
            max_position_embeddings=_size(data, "max_position_embeddings", 2048),
            tie_word_embeddings=bool(data.get("tie_word_embeddings", False)),
            dtype=str(data.get("dtype") or data.get("torch_dtype") or "float32"),
        )
        if heads % config.num_kv_heads:
            raise InputError(
                f"config.json has num_attention_heads {heads}, which num_key_value_heads "
                f"{config.num_kv_heads} does not divide"
            )
        if config.head_dim % 2:
            raise InputError(
                f"config.json has head_dim {config.head_dim}; rotary embedding needs an even one"
            )
        return config

    @property
    def kv_size(self) -> int:
        """Numbers that one token adds to the KV cache of one branch, over all layers."""
        return 2 * self.num_layers * self.num_kv_heads * self.head_dim


def _refuse_unsupported(data: Mapping[str, Any]) -> None:
    ropes = {key: data.get(key) or {} for key in ("rope_scaling", "rope_parameters")}
    for key, rope in ropes.items():
        if not isinstance(rope, dict):
            raise InputError(f"config.json has {key} {rope!r}; it must be an object")
    types = (rope.get("rope_type", rope.get("type", "default")) for rope in ropes.values())
    checks = (
        *(("rope_type", kind, ("default",)) for kind in types),
        ("hidden_act", data.get("hidden_act", "silu"), ("silu",)),
        ("attention_bias", data.get("attention_bias", False), (False, None)),
        ("mlp_bias", data.get("mlp_bias", False), (False, None)),
    )
    for key, value, supported in checks:
        if value not in supported:
            raise InputError(
                f"config.json has {key} {value!r}, which is not supported; known is {supported[0]!r}"
            )


def _size(data: Mapping[str, Any], key: str, default: int | None = None, most: int = MAX_SIZE) -> int:
    value = data.get(key)
    value = default if value is None else value
    if value is None:
        raise InputError(f"config.json has no {key}")
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
        raise InputError(f"config.json has {key} {value!r}; it must be a whole number from 1 to {most}")
    return value


def _positive(data: Mapping[str, Any], key: str, default: float) -> float:
    value = data.get(key, default)
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise InputError(f"config.json has {key} {value!r}; it must be a number above 0")
    return float(value)
