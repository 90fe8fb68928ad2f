"""The Llama decoder: token ids in, hidden states and logits out; the cache and the batch are arguments."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..kernels.linear import GatedLinear, Linear, arithmetic_dtype
from ..kernels.ops import TORCH, Ops
from .checkpoint import Checkpoint
from .config import ModelConfig
from .rope import RotaryTable

LAYER = {
    "input_layernorm": ("hidden",),
    "self_attn.q_proj": ("query", "hidden"),
    "self_attn.k_proj": ("kv", "hidden"),
    "self_attn.v_proj": ("kv", "hidden"),
    "self_attn.o_proj": ("hidden", "query"),
    "post_attention_layernorm": ("hidden",),
    "mlp.gate_proj": ("inner", "hidden"),
    "mlp.up_proj": ("inner", "hidden"),
    "mlp.down_proj": ("hidden", "inner"),
}
"""A layer's weights by their checkpoint names, and their shapes."""

EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


class Attention(Protocol):
    """The part of a KV cache that a decoder needs; see `kernels.attention.PagedKV.attend`."""

    def attend(self, layer: int, q: Tensor, kv: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Layer:
    """One decoder layer; products that read the same input are one."""

    attention_norm: Tensor
    qkv: Linear
    output: Linear
    mlp_norm: Tensor
    gate_up: GatedLinear
    down: Linear


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The tensors that a checkpoint of this model holds."""
    sizes = {
        "hidden": config.hidden_size,
        "query": config.num_heads * config.head_dim,
        "kv": config.num_kv_heads * config.head_dim,
        "inner": config.intermediate_size,
    }
    found: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, config.hidden_size)}
    for layer in range(config.num_layers):
        for name, dims in LAYER.items():
            found[f"model.layers.{layer}.{name}.weight"] = tuple(sizes[dim] for dim in dims)
    found[FINAL_NORM] = (config.hidden_size,)
    if not config.tie_word_embeddings:
        found[HEAD] = (config.vocab_size, config.hidden_size)
    return found


class Llama:
    """A decoder held on one device. `dtype` is the type of its weights' values."""

    def __init__(
        self,
        config: ModelConfig,
        checkpoint: Checkpoint,
        dtype: torch.dtype,
        device: torch.device,
        max_length: int,
        ops: Ops = TORCH,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """Streams the weights in, tensor by tensor. progress(done, total) counts their bytes.

        Raises InputError when the checkpoint does not have exactly the tensors of `shapes(config)`.
        """
        expected = shapes(config)
        duplicates = {name for name in checkpoint.shapes if name.endswith("rotary_emb.inv_freq")}
        checkpoint.require(
            expected, frozenset(duplicates | ({HEAD} if config.tie_word_embeddings else set()))
        )
        total = sum(torch.Size(shape).numel() for shape in expected.values()) * dtype.itemsize
        done = 0

        def weight(*names: str) -> Tensor:
            nonlocal done
            parts = [checkpoint.tensor(f"{name}.weight").to(device=device, dtype=dtype) for name in names]
            done += sum(part.nbytes for part in parts)
            if progress:
                progress(done, total)
            return torch.cat(parts) if len(parts) > 1 else parts[0]

        def linear(*names: str) -> Linear:
            return Linear(weight(*names))

        def layer(at: str) -> Layer:
            return Layer(
                attention_norm=weight(f"{at}.input_layernorm").float(),
                qkv=linear(f"{at}.self_attn.q_proj", f"{at}.self_attn.k_proj", f"{at}.self_attn.v_proj"),
                output=linear(f"{at}.self_attn.o_proj"),
                mlp_norm=weight(f"{at}.post_attention_layernorm").float(),
                gate_up=GatedLinear(
                    weight(f"{at}.mlp.gate_proj"), weight(f"{at}.mlp.up_proj"), None, ops.swiglu
                ),
                down=linear(f"{at}.mlp.down_proj"),
            )

        self.config, self.dtype, self.device, self.ops = config, dtype, device, ops
        self._embedding = weight(EMBEDDING.removesuffix(".weight")).clone()
        self._layers = [layer(f"model.layers.{index}") for index in range(config.num_layers)]
        self._eps = torch.tensor([config.rms_norm_eps], device=device)
        self._norm = weight(FINAL_NORM.removesuffix(".weight")).float()
        tied = config.tie_word_embeddings
        head = self._embedding if tied else weight(HEAD.removesuffix(".weight"))
        self._head = Linear(head, dtype=torch.float32 if device.type == "cpu" else dtype)
        self._rotary = RotaryTable(config.head_dim, config.rope_theta, max_length, device)
        self._arithmetic = arithmetic_dtype(dtype, device)

    def forward(self, token_ids: Tensor, positions: Tensor, cache: Attention) -> Tensor:
        """Hidden states after the final norm, [tokens, hidden], for token_ids and positions [tokens].

        `cache` knows which branch each token belongs to: it has been told of this step's batch.
        """
        config, ops = self.config, self.ops
        heads, kv_heads = config.num_heads, config.num_kv_heads
        cos, sin = self._rotary.at(positions, heads + kv_heads, kv_heads)
        x = self._embedding[token_ids].to(self._arithmetic)
        for index, layer in enumerate(self._layers):
            normed = ops.rms_norm(x, layer.attention_norm, self._eps)
            qkv = layer.qkv(normed).view(len(x), heads + 2 * kv_heads, config.head_dim)
            qkv = ops.rotate(qkv, cos, sin)  # float32, as cos and sin are
            attended = cache.attend(index, qkv[:, :heads], qkv[:, heads:])
            x = layer.output.add_to(x, attended if x.dtype == torch.float32 else attended.to(x.dtype))
            normed = ops.rms_norm(x, layer.mlp_norm, self._eps)
            x = layer.down.add_to(x, layer.gate_up(normed))
        return ops.rms_norm(x.to(self._head.dtype), self._norm, self._eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, hidden] → [rows, vocab], float32."""
        return self._head(hidden).float()
