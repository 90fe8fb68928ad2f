"""Model folders with small random weights, scaled so that every layer affects the output."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from ...models.config import ModelConfig
from ...models.decoder import param_shapes

if TYPE_CHECKING:
    from pathlib import Path

MODEL_KINDS: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True},
    "mistral": {"architectures": ["MistralForCausalLM"], "sliding_window": 40, "tie_word_embeddings": False},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": True},
}
WEIGHT_GAINS = {"q_proj": 2.0, "o_proj": 3.0, "down_proj": 3.0}
"""Weight scales: attention is not uniform, and layers outweigh the embedding."""


@dataclass(frozen=True)
class ModelSize:
    """Dimensions of a model."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int


SMALL_MODEL = ModelSize(
    hidden_size=512,
    intermediate_size=1024,
    num_layers=4,
    num_heads=8,
    num_kv_heads=2,
    head_dim=64,
    vocab_size=2048,
)
TINY_MODEL = ModelSize(
    hidden_size=40,
    intermediate_size=50,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=12,
    vocab_size=307,
)


def write_model(folder: Path, kind: str, size: ModelSize, dtype: torch.dtype) -> Path:
    """Write a model folder: config, weights in `dtype`, and a tokenizer with byte tokens."""
    folder.mkdir(parents=True)
    config = MODEL_KINDS[kind] | {
        "vocab_size": size.vocab_size,
        "hidden_size": size.hidden_size,
        "intermediate_size": size.intermediate_size,
        "num_hidden_layers": size.num_layers,
        "num_attention_heads": size.num_heads,
        "num_key_value_heads": size.num_kv_heads,
        "head_dim": size.head_dim,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 2048,
        "rope_theta": 10_000.0,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    generator = torch.Generator().manual_seed(7)
    shape_by_name = param_shapes(ModelConfig.from_dict(config))
    weights = {
        name: _random_weight(name, shape, generator).to(dtype) for name, shape in shape_by_name.items()
    }
    save_file(weights, folder / "model.safetensors")
    _make_tokenizer(size.vocab_size).save(str(folder / "tokenizer.json"))
    return folder


def _random_weight(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    noise = torch.randn(shape, generator=generator)
    if len(shape) == 1:
        return torch.add(1.0, noise, alpha=0.2)
    if name.endswith(("embed_tokens.weight", "lm_head.weight")):
        return noise.mul_(0.5 * (40 / shape[1]) ** 0.5)  # logits with the same spread at any width
    gain = next((gain for module, gain in WEIGHT_GAINS.items() if module in name), 1.0)
    return noise.mul_(gain / shape[1] ** 0.5)


def _make_tokenizer(size: int) -> Tokenizer:
    """A byte-level BPE tokenizer without merges: byte characters, then filler tokens up to `size`."""
    byte_chars = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*byte_chars, *(f"{byte_chars[0]}{index}" for index in range(size - len(byte_chars)))]
    tokenizer = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
