"""Which part of a model each of several processes holds: heads, the feed-forward and the vocabulary are cut.

A product whose rows are cut (queries, keys, values, gate, up, the head) gives each process its own outputs;
one whose columns are cut (the attention's output, down) takes those in and gives a partial sum, and all
partial sums are added: two exchanges a layer (Shoeybi et al., "Megatron-LM", 2019). A process sees a smaller
model of the same kind: its config has its own numbers of heads, and its weights are slices.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..kernels.common.errors import InputError
from ..kernels.cpu.linear import Linear
from ..kernels.distributed.vocab_parallel import Shard

if TYPE_CHECKING:
    from collections.abc import Mapping

    from ..kernels.distributed.communicator import Peers
    from .config import ModelConfig
    from .weights.source import Weights

CUT = ("query", "kv", "inner", "vocab")
"""The dimensions that are shared out."""
SUMMED = ("self_attn.o_proj.bias", "mlp.down_proj.bias")
"""What is added to a partial sum, and so by one process alone."""


def divides(size: int, config: ModelConfig) -> bool:
    """Whether the model can be shared out among `size` processes."""
    counts = (config.num_heads, config.num_kv_heads, config.intermediate_size)
    return not any(count % size for count in counts) and size <= config.vocab_size


def require(config: ModelConfig, size: int) -> None:
    """Raises InputError when the model cannot be shared out among `size` processes."""
    if not divides(size, config):
        raise InputError(
            f"tensor_parallel_size is {size}; it must divide the model's {config.num_heads} heads, "
            f"{config.num_kv_heads} key and value heads and feed-forward of {config.intermediate_size}",
            "tensor_parallel_size",
        )


@dataclass(frozen=True)
class Shards:
    """A model among these processes. names: of each tensor the names of its dimensions."""

    config: ModelConfig
    peers: Peers
    names: Mapping[str, tuple[str, ...]]

    @property
    def vocabulary(self) -> Shard:
        """The part of the vocabulary that is held here."""
        vocab = self.config.vocab_size
        ids = Shard.part(self.peers.rank, self.peers.size, vocab)
        return Shard(self.peers, ids.start, len(ids), vocab)

    @property
    def own(self) -> ModelConfig:
        """The shape of what is held here."""
        config, size = self.config, self.peers.size
        return replace(
            config,
            num_heads=config.num_heads // size,
            num_kv_heads=config.num_kv_heads // size,
            intermediate_size=config.intermediate_size // size,
            vocab_size=self.vocabulary.width,
        )

    def place(self, name: str, shape: tuple[int, ...]) -> tuple[slice, ...]:
        """Where in the tensor of this name and whole shape the part lies that is held here."""
        rank, size = self.peers.rank, self.peers.size
        parts = (
            Shard.part(rank, size, length) if dim in CUT else range(length)
            for dim, length in zip(self.names[name], shape, strict=True)
        )
        return tuple(slice(part.start, part.stop) for part in parts)


class ShardWeights:
    """Reads like the weights of the smaller model, and reads no more of the whole one's files."""

    def __init__(self, weights: Weights, shards: Shards, whole: Mapping[str, tuple[int, ...]]) -> None:
        self._weights, self._shards, self._whole = weights, shards, whole

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Of the whole tensors."""
        return self._weights.shapes

    def require(self, expected: Mapping[str, tuple[int, ...]], ignored: frozenset[str] = frozenset()) -> None:
        """As of the whole model, whatever the parts are expected to be."""
        self._weights.require(self._whole, ignored)

    def tensor(self, name: str, part: tuple[slice, ...] | None = None) -> Tensor:
        """The part that is held here; zeros for a bias that another process adds."""
        found = self._weights.tensor(name, self._shards.place(name, self._whole[name])).contiguous()
        return torch.zeros_like(found) if name.endswith(SUMMED) and self._shards.peers.rank else found


class PartialLinear(Linear):
    """A product whose columns are shared out: each process has a partial sum of it."""

    def __init__(self, weight: Tensor, bias: Tensor | None, peers: Peers) -> None:
        super().__init__(weight, bias)
        self._peers = peers

    def add_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual + the sum of the products, rounded once."""
        return (residual + self._peers.sum(self(x))).to(residual.dtype)


class ShardEmbedding:
    """Rows of the embedding, each held by one process."""

    def __init__(self, table: Tensor, vocabulary: Shard) -> None:
        self._table, self._vocabulary = table, vocabulary

    def __getitem__(self, token_ids: Tensor) -> Tensor:
        """The embeddings [tokens, hidden] of ids [tokens]: what others hold is added to zeros."""
        rows = token_ids - self._vocabulary.first
        others = (rows < 0) | (rows >= len(self._table))
        found = self._table[rows.masked_fill(others, 0)].masked_fill(others[:, None], 0)
        return self._vocabulary.peers.sum(found)
