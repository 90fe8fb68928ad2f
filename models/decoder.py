"""The decoder of every model family: token ids to hidden states and logits, with an external KV cache."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..kernels.attention_params import AttentionParams
from ..kernels.common.profiling import stage
from ..kernels.linear.format import GatedLayer, LinearLayer, WeightFormat
from ..kernels.linear.registry import select_format
from ..kernels.ops import TORCH_OPS, Ops
from ..kernels.reference.rotary import QKNorm, RotaryCosSin
from .architectures.switches import NormPlacement
from .common import memory
from .config import ModelConfig
from .layers.rotary_embedding import RotaryEmbedding
from .tensor_parallel import RowParallelLinear, TPSharding, VocabParallelEmbedding
from .weights.source import WeightSource

Progress = Callable[[int, int], None]

LAYER_SHAPES = {
    "self_attn.q_proj.weight": ("query", "hidden"),
    "self_attn.k_proj.weight": ("kv", "hidden"),
    "self_attn.v_proj.weight": ("kv", "hidden"),
    "self_attn.o_proj.weight": ("hidden", "query"),
    "mlp.gate_proj.weight": ("inner", "hidden"),
    "mlp.up_proj.weight": ("inner", "hidden"),
    "mlp.down_proj.weight": ("hidden", "inner"),
}
"""The checkpoint names of a layer's projections, and their dimensions."""
OPTIONAL_SHAPES = {
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
"""Further tensors of a layer, by the `ModelConfig` switch that enables them."""


class NormNames(NamedTuple):
    """The checkpoint names of a layer's norms of the residual stream; None where there is none."""

    pre_attention: str | None
    post_attention: str | None
    pre_mlp: str | None
    post_mlp: str | None


NORM_NAMES: dict[NormPlacement, NormNames] = {
    "before": NormNames("input_layernorm", None, "post_attention_layernorm", None),
    "after": NormNames(None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    "both": NormNames(
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
}
"""By `norm_placement`; the names are those of transformers' Llama, OLMo 2 and Gemma 2."""

EMBEDDING, FINAL_NORM = "model.embed_tokens.weight", "model.norm.weight"
LM_HEAD, SCORE_HEAD = "lm_head.weight", "score.weight"
"""The heads of a causal language model and of a classifier."""


class KVCache(Protocol):
    """The KV cache interface of a decoder; see `kernels.cpu.paged_kv_cache.CPUPagedKVCache.forward`."""

    def forward(
        self,
        layer: int,
        qkv: Tensor,
        rotary: RotaryCosSin,
        norm: QKNorm | None,
        params: AttentionParams,
    ) -> Tensor: ...


@dataclass(frozen=True)
class RMSNorm:
    """The float32 weight [hidden] and ε [1] of a norm of hidden states."""

    weight: Tensor
    eps: Tensor


@dataclass(frozen=True)
class DecoderLayer:
    """One decoder layer; projections that read the same input are merged."""

    pre_attention_norm: RMSNorm | None
    qkv_proj: LinearLayer
    qk_norm: QKNorm | None
    attention: AttentionParams
    o_proj: LinearLayer
    post_attention_norm: RMSNorm | None
    pre_mlp_norm: RMSNorm | None
    gate_up_proj: GatedLayer
    down_proj: LinearLayer
    post_mlp_norm: RMSNorm | None


def param_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """The names and shapes of this model's checkpoint tensors."""
    dim_sizes = {
        "vocab": config.vocab_size,
        "labels": len(config.labels),
        "hidden": config.hidden_size,
        "query": config.num_heads * config.head_dim,
        "kv": config.num_kv_heads * config.head_dim,
        "inner": config.intermediate_size,
        "head": config.head_dim,
    }
    return {name: tuple(dim_sizes[dim] for dim in dims) for name, dims in param_dims(config).items()}


def param_dims(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """The dimension names of each tensor, in the order of the computation."""
    layer_dims: dict[str, tuple[str, ...]] = {}
    norms = NORM_NAMES[config.norm_placement]
    for part, before, after in (
        ("self_attn", norms.pre_attention, norms.post_attention),
        ("mlp", norms.pre_mlp, norms.post_mlp),
    ):
        projections = {name: dims for name, dims in LAYER_SHAPES.items() if name.startswith(part)}
        layer_dims |= {f"{before}.weight": ("hidden",)} if before else {}
        layer_dims |= projections
        layer_dims |= {f"{after}.weight": ("hidden",)} if after else {}
    for flag, tensors in OPTIONAL_SHAPES.items():
        layer_dims |= tensors if getattr(config, flag) else {}
    dims_by_name: dict[str, tuple[str, ...]] = {EMBEDDING: ("vocab", "hidden")}
    for index in range(config.num_layers):
        for name, dims in layer_dims.items():
            dims_by_name[f"model.layers.{index}.{name}"] = dims
    dims_by_name[FINAL_NORM] = ("hidden",)
    dims_by_name[_head_name(config)] = ("labels" if config.labels else "vocab", "hidden")
    return dims_by_name


def _head_name(config: ModelConfig) -> str:
    """The name of the head's weight."""
    if config.labels:
        return SCORE_HEAD
    return EMBEDDING if config.tie_word_embeddings else LM_HEAD


def weight_bytes(config: ModelConfig, bytes_per_weight: float, device: torch.device) -> int:
    """Memory of the loaded weights in a format of `bytes_per_weight`."""
    num_params = sum(math.prod(shape) for shape in param_shapes(config).values())
    if config.tie_word_embeddings and device.type == "cpu":  # the head is a packed copy of the embedding
        num_params += config.vocab_size * config.hidden_size
    return math.ceil(num_params * bytes_per_weight)


def norms_per_layer(config: ModelConfig) -> int:
    """How many norms of hidden states a layer has."""
    return sum(name is not None for name in NORM_NAMES[config.norm_placement])


class Decoder:
    """A decoder on one device. `dtype` is the dtype of its weights, `lm_head` its head.

    Scales cost nothing. Norms after sublayers have the factor `residual_scale` m in their weight; without
    such norms the residual stream is stored divided by m, and the norms before sublayers use ε / m², which
    gives the same. The weight of the last norm has the factor `logits_scale`.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: WeightSource,
        dtype: torch.dtype,
        device: torch.device,
        ops: Ops = TORCH_OPS,
        progress: Progress | None = None,
        sharding: TPSharding | None = None,
    ) -> None:
        """Stream the weights in, tensor by tensor. progress(done, total) counts their bytes.

        With `sharding`, config and weights are those of this rank's shard.
        Raises InputError when the checkpoint does not have exactly the tensors of `param_shapes(config)`,
        RunError when the device has too little memory for them.
        """
        weight_format = select_format(dtype, device, ops.matmul)
        loader = _WeightLoader(config, weights, dtype, weight_format, device, ops, progress, sharding)
        self.config, self.dtype, self.device, self.ops = config, dtype, device, ops
        # the head first: packing the largest weight temporarily takes a multiple of its memory
        embedding = loader.load_embedding()
        self._embed_tokens = (
            VocabParallelEmbedding(embedding, sharding.vocab_shard) if sharding else embedding
        )
        lm_head = embedding if config.tie_word_embeddings else loader.load_tensor(_head_name(config))
        self.lm_head = ops.make_lm_head(lm_head.to(dtype), config.logits_softcap)
        self._layers = [loader.load_layer(index) for index in range(config.num_layers)]
        self._norm = loader.load_final_norm()
        self._embedding_scale = config.embedding_scale / _residual_unit(config)
        self._rotary_emb = RotaryEmbedding(config.rope, config.head_dim, device)
        self._compute_dtype = weight_format.compute_dtype

    def forward(
        self, token_ids: Tensor, positions: Tensor, cache: KVCache, rope_lengths: Tensor | None = None
    ) -> Tensor:
        """Hidden states after the final norm, [tokens, hidden], for token_ids and positions [tokens].

        `cache` must be prepared with this step's batch, which maps tokens to branches.
        `rope_lengths` [tokens]: each token's request's `Rope.rope_length`, required with dynamic RoPE.
        """
        config = self.config
        num_heads, num_kv_heads = config.num_heads, config.num_kv_heads
        rotary = RotaryCosSin(
            *self._rotary_emb.cos_sin(positions, rope_lengths), num_heads, num_kv_heads, config.query_scale
        )
        with stage("embed"):
            hidden_states = self._embed_tokens[token_ids].to(self.dtype).to(self._compute_dtype)
            if self._embedding_scale != 1:
                hidden_states = hidden_states * self._embedding_scale
        for index, layer in enumerate(self._layers):
            normed = self._normalize(hidden_states, layer.pre_attention_norm)
            with stage("qkv"):
                qkv = layer.qkv_proj(normed)
            qkv = qkv.view(len(hidden_states), num_heads + 2 * num_kv_heads, config.head_dim)
            attn_output = cache.forward(index, qkv, rotary, layer.qk_norm, layer.attention)
            if attn_output.dtype != hidden_states.dtype:
                attn_output = attn_output.to(hidden_states.dtype)
            with stage("output"):
                hidden_states = self._add_projection(
                    hidden_states, layer.o_proj, attn_output, layer.post_attention_norm
                )
            normed = self._normalize(hidden_states, layer.pre_mlp_norm)
            with stage("mlp"):
                hidden_states = self._add_projection(
                    hidden_states, layer.down_proj, layer.gate_up_proj(normed), layer.post_mlp_norm
                )
        return self._normalize(hidden_states.to(self.lm_head.dtype), self._norm)

    def _normalize(self, x: Tensor, norm: RMSNorm | None) -> Tensor:
        """The norm of x [tokens, hidden], or x without one."""
        if norm is None:
            return x
        with stage("norm"):
            return self.ops.rms_norm(x, norm.weight, norm.eps)

    def _add_projection(
        self, hidden_states: Tensor, projection: LinearLayer, x: Tensor, norm: RMSNorm | None
    ) -> Tensor:
        """hidden_states plus a sublayer's last projection of x, after the norm if there is one."""
        if norm is None:
            return projection.add_residual(hidden_states, x)
        return hidden_states + self._normalize(projection(x), norm)

    def compute_logits(self, hidden_states: Tensor) -> Tensor:
        """[rows, hidden] → float32 [rows, vocab]; classifiers: [rows, labels]; shards: their columns."""
        return self.lm_head(hidden_states)


class _WeightLoader:
    """Builds a decoder's modules from its tensors, reading each tensor once."""

    def __init__(
        self,
        config: ModelConfig,
        weights: WeightSource,
        dtype: torch.dtype,
        weight_format: WeightFormat,
        device: torch.device,
        ops: Ops,
        progress: Progress | None,
        sharding: TPSharding | None,
    ) -> None:
        self._format = weight_format
        self._config, self._weights, self._dtype, self._device = config, weights, dtype, device
        self._ops, self._progress, self._sharding = ops, progress, sharding
        self._eps = torch.tensor([config.rms_norm_eps], device=device)
        self._residual_eps = torch.tensor([config.rms_norm_eps / _residual_unit(config) ** 2], device=device)
        self._param_shapes = param_shapes(config)
        ignored = {dtype_name for dtype_name in weights.shapes if dtype_name.endswith("rotary_emb.inv_freq")}
        weights.validate(
            self._param_shapes, frozenset(ignored | ({LM_HEAD} if config.tie_word_embeddings else set()))
        )
        name = str(dtype).removeprefix("torch.")
        num_loading = (
            sharding.comm.world_size if sharding and device.type == "cpu" else 1
        )  # all ranks load at the same time
        num_bytes = weight_bytes(config, weight_format.bytes_per_weight, device) * num_loading
        memory.require_free(num_bytes, f"the model in {name}", device)
        self._total_bytes = sum(math.prod(shape) for shape in self._param_shapes.values()) * dtype.itemsize
        self._loaded_bytes = 0

    def load_embedding(self) -> Tensor:
        """On a CPU, memory-mapped and in the stored dtype: only the rows that are looked up are converted."""
        if self._device.type != "cpu":
            return self.load_tensor(EMBEDDING)
        embedding = self._weights.get_tensor(EMBEDDING)
        self._report_progress(embedding)
        return embedding

    def load_tensor(self, name: str) -> Tensor:
        tensor = self._weights.get_tensor(name).to(device=self._device, dtype=self._dtype)
        self._report_progress(tensor)
        return tensor

    def _report_progress(self, tensor: Tensor) -> None:
        self._loaded_bytes += tensor.numel() * self._dtype.itemsize
        if self._progress:
            self._progress(self._loaded_bytes, self._total_bytes)

    def load_final_norm(self) -> RMSNorm:
        """The norm before the head, with the scale of the logits; a classifier's outputs have none."""
        weight = self._load_norm_weight(FINAL_NORM)
        config = self._config
        return RMSNorm(weight if config.labels else weight * config.logits_scale, self._residual_eps)

    def load_layer(self, index: int) -> DecoderLayer:
        memory.trim_malloc()  # return the source tensors of the previous layer
        config, prefix = self._config, f"model.layers.{index}"
        norms, attn, mlp = NORM_NAMES[config.norm_placement], f"{prefix}.self_attn", f"{prefix}.mlp"
        return DecoderLayer(
            pre_attention_norm=self._load_pre_norm(prefix, norms.pre_attention),
            qkv_proj=self._load_merged_linear(f"{attn}.q_proj", f"{attn}.k_proj", f"{attn}.v_proj"),
            qk_norm=self._load_qk_norm(attn) if config.qk_norm else None,
            attention=AttentionParams(config.sliding_windows[index], config.attention_softcap),
            o_proj=self._load_row_parallel(f"{attn}.o_proj"),
            post_attention_norm=self._load_post_norm(prefix, norms.post_attention),
            pre_mlp_norm=self._load_pre_norm(prefix, norms.pre_mlp),
            gate_up_proj=self._load_gate_up(f"{mlp}.gate_proj", f"{mlp}.up_proj"),
            down_proj=self._load_row_parallel(f"{mlp}.down_proj"),
            post_mlp_norm=self._load_post_norm(prefix, norms.post_mlp),
        )

    def _load_norm_weight(self, name: str) -> Tensor:
        return self.load_tensor(name).float() + self._config.norm_offset

    def _load_pre_norm(self, prefix: str, name: str | None) -> RMSNorm | None:
        """A norm of the residual stream."""
        return (
            RMSNorm(self._load_norm_weight(f"{prefix}.{name}.weight"), self._residual_eps) if name else None
        )

    def _load_post_norm(self, prefix: str, name: str | None) -> RMSNorm | None:
        """A norm of what a sublayer adds to the residual stream."""
        if name is None:
            return None
        weight = self._load_norm_weight(f"{prefix}.{name}.weight") * self._config.residual_scale
        return RMSNorm(weight, self._eps)

    def _load_merged_linear(self, *names: str) -> LinearLayer:
        return self._format.create(*self._load_merged(names))

    def _load_row_parallel(self, name: str) -> LinearLayer:
        layer = self._format.create(*self._load_merged((name,)))
        return RowParallelLinear(layer, self._sharding.comm) if self._sharding else layer

    def _load_merged(self, names: Sequence[str]) -> tuple[Tensor, Tensor | None]:
        """Concatenated weights and biases of these projections."""
        weights = [self.load_tensor(f"{name}.weight") for name in names]
        biases = [self.load_tensor(f"{name}.bias") for name in names if f"{name}.bias" in self._param_shapes]
        return _concat(weights), _concat(biases) if biases else None

    def _load_gate_up(self, gate: str, up: str) -> GatedLayer:
        weights = self.load_tensor(f"{gate}.weight"), self.load_tensor(f"{up}.weight")
        has_bias = self._config.mlp_bias
        biases = (self.load_tensor(f"{gate}.bias"), self.load_tensor(f"{up}.bias")) if has_bias else None
        return self._format.create_gated(*weights, biases, self._ops.swiglu)

    def _load_qk_norm(self, prefix: str) -> QKNorm:
        q, k = (self._load_norm_weight(f"{prefix}.{name}.weight") for name in ("q_norm", "k_norm"))
        config = self._config
        weight = torch.cat((q.expand(config.num_heads, -1), k.expand(config.num_kv_heads, -1)))
        return QKNorm(weight, self._eps)


def _residual_unit(config: ModelConfig) -> float:
    """What the residual stream is divided by."""
    return config.residual_scale if config.norm_placement == "before" else 1.0


def _concat(tensors: list[Tensor]) -> Tensor:
    """Concatenate along the rows; a single tensor is not copied."""
    return torch.cat(tensors) if len(tensors) > 1 else tensors[0]
