"""Which implementation of each operation an engine runs: a value that names them all."""

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
    """A paged KV cache; see `attention.CPUPagedKVCache` for what its methods do."""

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
        """What one page takes."""

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
    """The decoder's operations, the cache that they attend over, and what chooses tokens.

    sample: from the head and hidden states, see `lm_head.sample_from_hidden`. cuda_graphs: the host reads
    nothing back between a decoding step's token ids and its hidden states, so that they may be captured
    once and replayed. jit_monitor: what counts the kernels that first launches compile, and warm_shapes:
    steps to launch before the first request, as (requests, branches of the widest), from device and most
    rows; None where none are.
    """

    ops: Ops
    cache_cls: type[KVCache]
    sample: Callable[..., SamplerOutput]
    cuda_graphs: bool = False
    jit_monitor: Callable[[], CompileCounter] | None = None
    warmup_shapes: Callable[[torch.device, int], list[tuple[int, int]]] | None = None


MIN_SHAPE = 1, 2
"""A request with two branches, which has all that a step may have."""


def min_warmup_shapes(device: torch.device, max_rows: int) -> list[tuple[int, int]]:
    """The `warm_shapes` of a backend whose kernels are the same for steps of any shape."""
    return [MIN_SHAPE]


CPU_BACKEND = Backend(TORCH_OPS, CPUPagedKVCache, sample_from_hidden)
"""The torch references, which a CPU decodes with."""
REFERENCE_BACKEND = Backend(TORCH_OPS, PagedKVCache, sample_from_hidden)
"""The torch references on any device: what its kernels are checked by, and slow."""
