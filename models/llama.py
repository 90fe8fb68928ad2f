"""The Llama decoder: token ids in, hidden states and logits out; the cache and the batch are arguments."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..kernels.cpu.linear import GatedLinear, Linear, arithmetic_dtype
from ..kernels.ops import TORCH, Ops
from ..kernels.reference.rotary import HeadNorm, Turns
from .common import memory
from .config import ModelConfig
from .layers.rotary_embedding import Rotary
from .tensor_parallel import PartialLinear, ShardEmbedding, Shards
from .weights.source import Weights

Progress = Callable[[int, int], None]

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

EMBEDDING, FINAL_NORM = "model.embed_tokens.weight", "model.norm.weight"
HEAD, SCORE = "lm_head.weight", "score.weight"
"""Of a model that writes, and of a classifier."""


class Attention(Protocol):
    """The part of a KV cache that a decoder needs; see `kernels.cpu.paged_kv_cache.PagedKV.attend`."""

    def attend(
        self, layer: int, qkv: Tensor, turns: Turns, norm: HeadNorm | None, window: int | None
    ) -> Tensor: ...


@dataclass(frozen=True)
class Layer:
    """One decoder layer; products that read the same input are one."""

    attention_norm: Tensor
    qkv: Linear
    head_norm: HeadNorm | None
    output: Linear
    mlp_norm: Tensor
    gate_up: GatedLinear
    down: Linear


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The tensors that a checkpoint of this model holds."""
    sizes = {
        "vocab": config.vocab_size,
        "labels": len(config.labels),
        "hidden": config.hidden_size,
        "query": config.num_heads * config.head_dim,
        "kv": config.num_kv_heads * config.head_dim,
        "inner": config.intermediate_size,
        "head": config.head_dim,
    }
    return {name: tuple(sizes[dim] for dim in dims) for name, dims in dimensions(config).items()}


def dimensions(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """The names of the dimensions of each tensor."""
    layer = dict(LAYER)
    for switch, tensors in SWITCHED.items():
        layer |= tensors if getattr(config, switch) else {}
    found: dict[str, tuple[str, ...]] = {EMBEDDING: ("vocab", "hidden")}
    for index in range(config.num_layers):
        for name, dims in layer.items():
            found[f"model.layers.{index}.{name}"] = dims
    found[FINAL_NORM] = ("hidden",)
    found[_head(config)] = ("labels" if config.labels else "vocab", "hidden")
    return found


def _head(config: ModelConfig) -> str:
    """The tensor that the last product multiplies by."""
    if config.labels:
        return SCORE
    return EMBEDDING if config.tie_word_embeddings else HEAD


def held_bytes(config: ModelConfig, itemsize: int, device: torch.device) -> int:
    """The memory that the weights take once they are loaded, in a type of `itemsize` bytes."""
    numbers = sum(math.prod(shape) for shape in shapes(config).values())
    if config.tie_word_embeddings and device.type == "cpu":  # packed for its product, beside the embedding
        numbers += config.vocab_size * config.hidden_size
    return numbers * itemsize


class Llama:
    """A decoder held on one device. `dtype` is the type of its weights' values, `head` its last product."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        dtype: torch.dtype,
        device: torch.device,
        ops: Ops = TORCH,
        progress: Progress | None = None,
        shards: Shards | None = None,
    ) -> None:
        """Streams the weights in, tensor by tensor. progress(done, total) counts their bytes.

        With `shards` config and weights are those of a part, which computes with the others.
        Raises InputError when the checkpoint does not have exactly the tensors of `shapes(config)`, RunError
        when the device has too little memory for them.
        """
        load = _Loader(config, weights, dtype, device, ops, progress, shards)
        self.config, self.dtype, self.device, self.ops = config, dtype, device, ops
        # the head first: packing the largest weight takes a multiple of its memory for a moment
        table = load.embedding()
        self._embedding = ShardEmbedding(table, shards.vocabulary) if shards else table
        head = table if config.tie_word_embeddings else load.tensor(_head(config))
        self.head = ops.head(head.to(dtype))
        self._layers = [load.layer(f"model.layers.{index}") for index in range(config.num_layers)]
        self._norm = load.norm(FINAL_NORM)
        self._eps = load.eps
        self._rotary = Rotary(config.rope, config.head_dim, device)
        self._arithmetic = arithmetic_dtype(dtype, device)

    def forward(
        self, token_ids: Tensor, positions: Tensor, cache: Attention, lengths: Tensor | None = None
    ) -> Tensor:
        """Hidden states after the final norm, [tokens, hidden], for token_ids and positions [tokens].

        `cache` knows which branch each token belongs to: it has been told of this step's batch. `lengths`
        [tokens] are what each token's request turns by, and are needed where the config's rope is dynamic.
        """
        config, ops = self.config, self.ops
        heads, kv_heads = config.num_heads, config.num_kv_heads
        turns = Turns(*self._rotary.at(positions, lengths), heads, kv_heads, config.head_dim**-0.5)
        x = self._embedding[token_ids].to(self.dtype).to(self._arithmetic)
        for index, layer in enumerate(self._layers):
            normed = ops.rms_norm(x, layer.attention_norm, self._eps)
            qkv = layer.qkv(normed).view(len(x), heads + 2 * kv_heads, config.head_dim)
            attended = cache.attend(index, qkv, turns, layer.head_norm, config.windows[index])
            x = layer.output.add_to(x, attended if attended.dtype == x.dtype else attended.to(x.dtype))
            normed = ops.rms_norm(x, layer.mlp_norm, self._eps)
            x = layer.down.add_to(x, layer.gate_up(normed))
        return ops.rms_norm(x.to(self.head.dtype), self._norm, self._eps)

    def logits(self, hidden: Tensor) -> Tensor:
        """[rows, hidden] → [rows, vocab], of a classifier [rows, labels], of a part its columns; float32."""
        return self.head(hidden)


class _Loader:
    """Makes a decoder's parts of its tensors, each read once."""

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        dtype: torch.dtype,
        device: torch.device,
        ops: Ops,
        progress: Progress | None,
        shards: Shards | None,
    ) -> None:
        self._config, self._weights, self._dtype, self._device = config, weights, dtype, device
        self._ops, self._progress, self._shards = ops, progress, shards
        self.eps = torch.tensor([config.rms_norm_eps], device=device)
        self._expected = shapes(config)
        spare = {name for name in weights.shapes if name.endswith("rotary_emb.inv_freq")}
        weights.require(self._expected, frozenset(spare | ({HEAD} if config.tie_word_embeddings else set())))
        name = str(dtype).removeprefix("torch.")
        beside = shards.peers.size if shards and device.type == "cpu" else 1  # they load at the same time
        memory.require(held_bytes(config, dtype.itemsize, device) * beside, f"the model in {name}", device)
        self._total = sum(math.prod(shape) for shape in self._expected.values()) * dtype.itemsize
        self._done = 0

    def embedding(self) -> Tensor:
        """On a CPU as it is stored, in the mapped file: only the rows that are looked up take the dtype."""
        if self._device.type != "cpu":
            return self.tensor(EMBEDDING)
        found = self._weights.tensor(EMBEDDING)
        self._count(found)
        return found

    def tensor(self, name: str) -> Tensor:
        found = self._weights.tensor(name).to(device=self._device, dtype=self._dtype)
        self._count(found)
        return found

    def _count(self, tensor: Tensor) -> None:
        self._done += tensor.numel() * self._dtype.itemsize
        if self._progress:
            self._progress(self._done, self._total)

    def norm(self, name: str) -> Tensor:
        return self.tensor(name).float()

    def layer(self, at: str) -> Layer:
        memory.release()  # what the parts before were packed from
        attention, mlp = f"{at}.self_attn", f"{at}.mlp"
        return Layer(
            attention_norm=self.norm(f"{at}.input_layernorm.weight"),
            qkv=self._linear(f"{attention}.q_proj", f"{attention}.k_proj", f"{attention}.v_proj"),
            head_norm=self._head_norm(attention) if self._config.qk_norm else None,
            output=self._summing(f"{attention}.o_proj"),
            mlp_norm=self.norm(f"{at}.post_attention_layernorm.weight"),
            gate_up=self._gated(f"{mlp}.gate_proj", f"{mlp}.up_proj"),
            down=self._summing(f"{mlp}.down_proj"),
        )

    def _linear(self, *names: str) -> Linear:
        return Linear(*self._tensors(names), matmul=self._ops.matmul)

    def _summing(self, name: str) -> Linear:
        weight, bias = self._tensors((name,))
        if self._shards:
            return PartialLinear(weight, bias, self._shards.peers)
        return Linear(weight, bias, matmul=self._ops.matmul)

    def _tensors(self, names: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """Weight and bias of these products in one."""
        weights = [self.tensor(f"{name}.weight") for name in names]
        biases = [self.tensor(f"{name}.bias") for name in names if f"{name}.bias" in self._expected]
        return _joined(weights), _joined(biases) if biases else None

    def _gated(self, gate: str, up: str) -> GatedLinear:
        weights = self.tensor(f"{gate}.weight"), self.tensor(f"{up}.weight")
        with_bias = self._config.mlp_bias
        biases = (self.tensor(f"{gate}.bias"), self.tensor(f"{up}.bias")) if with_bias else None
        return GatedLinear(*weights, biases, self._ops.swiglu, self._ops.matmul)

    def _head_norm(self, attention: str) -> HeadNorm:
        q, k = (self.norm(f"{attention}.{name}.weight") for name in ("q_norm", "k_norm"))
        config = self._config
        weight = torch.cat((q.expand(config.num_heads, -1), k.expand(config.num_kv_heads, -1)))
        return HeadNorm(weight, self.eps)


def _joined(parts: list[Tensor]) -> Tensor:
    """The parts below one another; one alone is not copied."""
    return torch.cat(parts) if len(parts) > 1 else parts[0]
