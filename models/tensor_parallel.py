"""Tensor parallelism: sharding of heads, MLP columns and vocabulary rows over processes.

Column-parallel layers (queries, keys, values, gate, up, the head) shard the rows of the weight [out, in], so
each process computes a part of the outputs. Row-parallel layers (the attention's output, down) shard its
columns: they read those outputs and yield partial sums, which are all-reduced, twice per layer (Shoeybi et
al., "Megatron-LM", 2019). Each process runs a smaller model: its config has the local numbers of heads, and
its weights are slices.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..kernels.common.errors import InputError
from ..kernels.distributed.vocab_parallel import VocabShard

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..kernels.distributed.communicator import Communicator
    from ..kernels.linear.format import LinearLayer
    from .config import ModelConfig
    from .weights.source import WeightSource

SHARDED_DIMS = ("query", "kv", "inner", "vocab")
"""The sharded dimensions."""
RANK0_BIASES = ("self_attn.o_proj.bias", "mlp.down_proj.bias")
"""Biases added to a partial sum, and so by rank 0 alone."""


def is_divisible(tp_size: int, config: ModelConfig) -> bool:
    """Whether the model can be sharded over `tp_size` processes."""
    counts = (config.num_heads, config.num_kv_heads, config.intermediate_size)
    return not any(count % tp_size for count in counts) and tp_size <= config.vocab_size


def validate_tp_size(config: ModelConfig, tp_size: int) -> None:
    """Raises InputError when the model cannot be sharded over `tp_size` processes."""
    if not is_divisible(tp_size, config):
        raise InputError(
            f"tensor_parallel_size is {tp_size}; it must divide the model's {config.num_heads} heads, "
            f"{config.num_kv_heads} KV heads and intermediate size {config.intermediate_size}",
            "tensor_parallel_size",
        )


@dataclass(frozen=True)
class TPSharding:
    """How this process shards a model. param_dims: the dimension names of each tensor."""

    config: ModelConfig
    comm: Communicator
    param_dims: Mapping[str, tuple[str, ...]]

    @property
    def vocab_shard(self) -> VocabShard:
        """The vocabulary shard of this process."""
        vocab_size = self.config.vocab_size
        id_range = VocabShard.shard_range(self.comm.rank, self.comm.world_size, vocab_size)
        return VocabShard(self.comm, id_range.start, len(id_range), vocab_size)

    @property
    def local_config(self) -> ModelConfig:
        """The config of this process's shard."""
        config, tp_size = self.config, self.comm.world_size
        return replace(
            config,
            num_heads=config.num_heads // tp_size,
            num_kv_heads=config.num_kv_heads // tp_size,
            intermediate_size=config.intermediate_size // tp_size,
            vocab_size=self.vocab_shard.shard_size,
        )

    def shard_slices(self, name: str, shape: tuple[int, ...]) -> tuple[slice, ...]:
        """This process's slices of a tensor with the full shape `shape`."""
        rank, tp_size = self.comm.rank, self.comm.world_size
        ranges = (
            VocabShard.shard_range(rank, tp_size, length) if dim in SHARDED_DIMS else range(length)
            for dim, length in zip(self.param_dims[name], shape, strict=True)
        )
        return tuple(slice(dim_range.start, dim_range.stop) for dim_range in ranges)


class ShardedWeights:
    """A `WeightSource` of this process's shard, which reads only its slices from the full model's files."""

    def __init__(
        self, weights: WeightSource, sharding: TPSharding, full_shapes: Mapping[str, tuple[int, ...]]
    ) -> None:
        self._weights, self._sharding, self._full_shapes = weights, sharding, full_shapes

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """The full tensors' shapes."""
        return self._weights.shapes

    def validate(
        self, expected: Mapping[str, tuple[int, ...]], ignored: frozenset[str] = frozenset()
    ) -> None:
        """Validate the full model's tensors; `expected`, the shard's shapes, is ignored."""
        self._weights.validate(self._full_shapes, ignored)

    def get_tensor(self, name: str, slices: tuple[slice, ...] | None = None) -> Tensor:
        """This process's slice; zeros for a bias that rank 0 adds."""
        tensor = self._weights.get_tensor(
            name, self._sharding.shard_slices(name, self._full_shapes[name])
        ).contiguous()
        return (
            torch.zeros_like(tensor) if name.endswith(RANK0_BIASES) and self._sharding.comm.rank else tensor
        )


class RowParallelLinear:
    """A linear layer with sharded input columns: each process computes a partial sum."""

    def __init__(self, layer: LinearLayer, comm: Communicator) -> None:
        self._layer, self._comm = layer, comm

    def __call__(self, x: Tensor) -> Tensor:
        """The all-reduced product."""
        return self._comm.all_reduce(self._layer(x))

    def add_residual(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual + the all-reduced product, rounded once."""
        return (residual + self(x)).to(residual.dtype)


class VocabParallelEmbedding:
    """An embedding with its rows sharded over the processes."""

    def __init__(self, weight: Tensor, vocab_shard: VocabShard) -> None:
        self._weight, self._vocab_shard = weight, vocab_shard

    def __getitem__(self, token_ids: Tensor) -> Tensor:
        """Embeddings [tokens, hidden] of ids [tokens]: rows of other ranks are zero before the all-reduce."""
        rows = token_ids - self._vocab_shard.vocab_start
        mask = (rows < 0) | (rows >= len(self._weight))
        embeddings = self._weight[rows.masked_fill(mask, 0)].masked_fill(mask[:, None], 0)
        return self._vocab_shard.comm.all_reduce(embeddings)
