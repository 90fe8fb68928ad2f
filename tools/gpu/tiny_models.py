"""Small random models of each kind, as folders, whose every part matters to what they say."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from ...models.config import ModelConfig
from ...models.llama import shapes

if TYPE_CHECKING:
    from pathlib import Path

KINDS: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True},
    "mistral": {"architectures": ["MistralForCausalLM"], "sliding_window": 40, "tie_word_embeddings": False},
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": True},
}
GAINS = {"q_proj": 2.0, "o_proj": 3.0, "down_proj": 3.0}
"""Attention that is not flat, and layers that outweigh the embedding."""


@dataclass(frozen=True)
class Size:
    """How large such a model is."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int


SMALL = Size(hidden=512, inner=1024, layers=4, heads=8, kv_heads=2, head_dim=64, vocab=2048)
TINY = Size(hidden=40, inner=50, layers=1, heads=4, kv_heads=2, head_dim=12, vocab=307)


def write(folder: Path, kind: str, size: Size, dtype: torch.dtype) -> Path:
    """A whole model folder: configuration, weights of this type, and a vocabulary of bytes and numbers."""
    folder.mkdir(parents=True)
    config = KINDS[kind] | {
        "vocab_size": size.vocab,
        "hidden_size": size.hidden,
        "intermediate_size": size.inner,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.kv_heads,
        "head_dim": size.head_dim,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 2048,
        "rope_theta": 10_000.0,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    generator = torch.Generator().manual_seed(7)
    found = shapes(ModelConfig.from_dict(config))
    weights = {name: _weight(name, shape, generator).to(dtype) for name, shape in found.items()}
    save_file(weights, folder / "model.safetensors")
    _vocabulary(size.vocab).save(str(folder / "tokenizer.json"))
    return folder


def _weight(name: str, shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    noise = torch.randn(shape, generator=generator)
    if len(shape) == 1:
        return torch.add(1.0, noise, alpha=0.2)
    if name.endswith(("embed_tokens.weight", "lm_head.weight")):
        return noise.mul_(0.5 * (40 / shape[1]) ** 0.5)  # logits of the same spread whatever the width
    gain = next((gain for part, gain in GAINS.items() if part in name), 1.0)
    return noise.mul_(gain / shape[1] ** 0.5)


def _vocabulary(size: int) -> Tokenizer:
    """The letters that bytes are written as, then words that no text has."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(f"{letters[0]}{index}" for index in range(size - len(letters)))]
    backend = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return backend
