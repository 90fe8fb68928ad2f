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
from .rope import Rotary

LAYER = {
    "input_layernorm.weight": ("hidden",),
    "self_attn.q_proj.weight": ("query", "hidden"),
    "self_attn.k_proj.weight": ("kv", "hidden"),
    "self_attn.v_proj.weight": ("kv", "hidden"),
    "self_attn.o_proj.weight": ("hidden", "query"),
    "post_attention_layernorm.weight": ("hidden",),
    "mlp.gate_proj.weight": ("inner", "hidden"),
    "mlp.up_proj.weight": ("inner", "hidden"),
    "mlp.down_proj.weight": ("hidden", "inner"),
}
"""A layer's tensors by their checkpoint names, and their shapes."""
SWITCHED = {
    "qkv_bias": {
        "self_attn.q_proj.bias": ("query",),
        "self_attn.k_proj.bias": ("kv",),
        "self_attn.v_proj.bias": ("kv",),
    },
    "output_bias": {"self_attn.o_proj.bias": ("hidden",)},
    "mlp_bias": {
        "mlp.gate_proj.bias": ("inner",),
        "mlp.up_proj.bias": ("inner",),
        "mlp.down_proj.bias": ("hidden",),
    },
    "qk_norm": {"self_attn.q_norm.weight": ("head",), "self_attn.k_norm.weight": ("head",)},
}
"""Those that a layer has besides, where the switch of that name is on in the config."""

EMBEDDING, FINAL_NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


class Attention(Protocol):
    """The part of a KV cache that a decoder needs; see `kernels.attention.PagedKV.attend`."""

    def attend(self, layer: int, q: Tensor, kv: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Layer:
    """One decoder layer; products that read the same input are one."""

    attention_norm: Tensor
    qkv: Linear
    qk_norm: Tensor | None  # [heads + kv_heads, head_dim]
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
        "head": config.head_dim,
    }
    layer = dict(LAYER)
    for switch, tensors in SWITCHED.items():
        layer |= tensors if getattr(config, switch) else {}
    found: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, config.hidden_size)}
    for index in range(config.num_layers):
        for name, dims in layer.items():
            found[f"model.layers.{index}.{name}"] = tuple(sizes[dim] for dim in dims)
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

        def tensor(name: str) -> Tensor:
            nonlocal done
            found = checkpoint.tensor(name).to(device=device, dtype=dtype)
            done += found.nbytes
            if progress:
                progress(done, total)
            return found

        def norm(name: str) -> Tensor:
            return tensor(f"{name}.weight").float()

        def linear(*names: str) -> Linear:
            weights = [tensor(f"{name}.weight") for name in names]
            biases = [tensor(f"{name}.bias") for name in names if f"{name}.bias" in expected]
            return Linear(_joined(weights), _joined(biases) if biases else None)

        def gated(gate: str, up: str) -> GatedLinear:
            weights = tensor(f"{gate}.weight"), tensor(f"{up}.weight")
            biases = (tensor(f"{gate}.bias"), tensor(f"{up}.bias")) if config.mlp_bias else None
            return GatedLinear(*weights, biases, ops.swiglu)

        def head_norms(q: str, k: str) -> Tensor:
            each = norm(q).expand(config.num_heads, -1), norm(k).expand(config.num_kv_heads, -1)
            return torch.cat(each)

        def layer(at: str) -> Layer:
            attention, mlp = f"{at}.self_attn", f"{at}.mlp"
            return Layer(
                attention_norm=norm(f"{at}.input_layernorm"),
                qkv=linear(f"{attention}.q_proj", f"{attention}.k_proj", f"{attention}.v_proj"),
                qk_norm=head_norms(f"{attention}.q_norm", f"{attention}.k_norm") if config.qk_norm else None,
                output=linear(f"{attention}.o_proj"),
                mlp_norm=norm(f"{at}.post_attention_layernorm"),
                gate_up=gated(f"{mlp}.gate_proj", f"{mlp}.up_proj"),
                down=linear(f"{mlp}.down_proj"),
            )

        self.config, self.dtype, self.device, self.ops = config, dtype, device, ops
        self._embedding = tensor(EMBEDDING).clone()
        self._layers = [layer(f"model.layers.{index}") for index in range(config.num_layers)]
        self._eps = torch.tensor([config.rms_norm_eps], device=device)
        self._norm = tensor(FINAL_NORM).float()
        head = self._embedding if config.tie_word_embeddings else tensor(HEAD)
        self._head = Linear(head, dtype=torch.float32 if device.type == "cpu" else dtype)
        self._rotary = Rotary(config.rope, config.head_dim, device)
        self._arithmetic = arithmetic_dtype(dtype, device)

    def forward(
        self, token_ids: Tensor, positions: Tensor, cache: Attention, lengths: Tensor | None = None
    ) -> Tensor:
        """Hidden states after the final norm, [tokens, hidden], for token_ids and positions [tokens].

        `cache` knows which branch each token belongs to: it has been told of this step's batch. `lengths`
        [tokens], the longest prompt of each token's request, are needed where the config's rope is dynamic.
        """
        config, ops = self.config, self.ops
        heads, kv_heads = config.num_heads, config.num_kv_heads
        cos, sin = self._rotary.at(positions, heads + kv_heads, kv_heads, lengths)
        x = self._embedding[token_ids].to(self._arithmetic)
        for index, layer in enumerate(self._layers):
            normed = ops.rms_norm(x, layer.attention_norm, self._eps)
            qkv = layer.qkv(normed).view(len(x), heads + 2 * kv_heads, config.head_dim)
            if layer.qk_norm is not None:
                qkv[:, :-kv_heads] = ops.rms_norm(qkv[:, :-kv_heads], layer.qk_norm, self._eps)
            qkv = ops.rotate(qkv, cos, sin)  # float32, as cos and sin are
            attended = cache.attend(index, qkv[:, :heads], qkv[:, heads:])
            x = layer.output.add_to(x, attended if x.dtype == torch.float32 else attended.to(x.dtype))
            normed = ops.rms_norm(x, layer.mlp_norm, self._eps)
            x = layer.down.add_to(x, layer.gate_up(normed))
        return ops.rms_norm(x.to(self._head.dtype), self._norm, self._eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, hidden] → [rows, vocab], float32."""
        return self._head(hidden).float()


def _joined(parts: list[Tensor]) -> Tensor:
    """The parts below one another; one alone is not copied."""
    return torch.cat(parts) if len(parts) > 1 else parts[0]
