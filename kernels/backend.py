"""Kernel backends: the implementation of each operation that an engine runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from .cpu.paged_kv_cache import CPUPagedKVCache
from .lm_head import sample_from_hidden
from .ops import TORCH_OPS, Ops
from .reference.paged_kv_cache import PagedKVCache

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .attention_metadata import RaggedBatch
    from .attention_params import AttentionParams
    from .reference.rotary import QKNorm, RotaryCosSin
    from .steering.step import SamplerOutput


class KVCache(Protocol):
    """Interface of a paged KV cache; `cpu.paged_kv_cache.CPUPagedKVCache` documents the methods."""

    blocks: Tensor
    block_size: int

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None: ...

    @staticmethod
    def block_bytes(
        num_layers: int, block_size: int, num_kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> int:
        """Bytes of one block, over all layers."""

    def prepare(self, batch: RaggedBatch) -> None: ...

    def forward(
        self,
        layer: int,
        qkv: Tensor,
        rotary: RotaryCosSin,
        norm: QKNorm | None,
        params: AttentionParams,
    ) -> Tensor: ...

    def zero_blocks(self, block_ids: list[int]) -> None: ...

    def swap_blocks(self, pairs: Iterable[tuple[int, int]]) -> None: ...


class CompileCounter(Protocol):
    """Counts the kernels that an engine's launches compile; see `triton.jit_monitor.JITMonitor`."""

    count: int
    late: int

    def attribute_to_this_thread(self) -> AbstractContextManager[None]: ...

    def seal(self) -> None: ...


@dataclass(frozen=True)
class Backend:
    """The decoder's operations, the KV cache class, and the sampler.

    sample: LM head and hidden states to tokens, see `lm_head.sample_from_hidden`. cuda_graphs: the host reads
    nothing back between a decode step's token ids and its hidden states, so they can be captured once and
    replayed. jit_monitor: creates the counter of kernels compiled at their first launch; None if nothing is
    compiled. warmup_shapes: (device, max_rows) → the steps to launch before the first request, each as
    (requests, most branches of one request); None if no warm-up is needed.
    """

    ops: Ops
    cache_cls: type[KVCache]
    sample: Callable[..., SamplerOutput]
    cuda_graphs: bool = False
    jit_monitor: Callable[[], CompileCounter] | None = None
    warmup_shapes: Callable[[torch.device, int], list[tuple[int, int]]] | None = None


MIN_SHAPE = 1, 2
"""One request with two branches: uses every feature of a step."""


def min_warmup_shapes(device: torch.device, max_rows: int) -> list[tuple[int, int]]:
    """The `warmup_shapes` of a backend whose kernels are the same for steps of any shape."""
    return [MIN_SHAPE]


CPU_BACKEND = Backend(TORCH_OPS, CPUPagedKVCache, sample_from_hidden)
"""The CPU backend: torch operations and the CPU KV cache."""
REFERENCE_BACKEND = Backend(TORCH_OPS, PagedKVCache, sample_from_hidden)
"""The torch references on any device: slow; the device's kernels are checked against them."""
