"""What the operations of a step run on: one value that names the implementation of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from .cpu.paged_kv_cache import PagedKV
from .lm_head import choose
from .ops import TORCH as TORCH_OPS
from .ops import Ops
from .reference.paged_kv_cache import DeviceKV

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .attention_metadata import Batch
    from .reference.rotary import HeadNorm, Turns
    from .steering.step import Choice


class Cache(Protocol):
    """A paged KV cache; see `attention.PagedKV` for what its methods do."""

    pages: Tensor
    block_size: int

    def __init__(
        self,
        layers: int,
        pages: int,
        block_size: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None: ...

    @staticmethod
    def page_bytes(layers: int, block_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        """What one page takes."""

    def begin(self, batch: Batch) -> None: ...

    def attend(
        self, layer: int, qkv: Tensor, turns: Turns, norm: HeadNorm | None, window: int | None
    ) -> Tensor: ...

    def clear(self, pages: list[int]) -> None: ...

    def swap(self, pairs: Iterable[tuple[int, int]]) -> None: ...


class Compiles(Protocol):
    """Counts the kernels that an engine's launches compile; see `gpu.compiles.Compiles`."""

    count: int
    late: int

    def by_this_thread(self) -> AbstractContextManager[None]: ...

    def expect_none(self) -> None: ...


@dataclass(frozen=True)
class Backend:
    """The decoder's operations, the cache that they attend over, and what chooses tokens.

    choose: from the head and hidden states, see `lm_head.choose`. graphs: the host reads nothing back between
    a decoding step's token ids and its hidden states, so that they may be captured once and replayed.
    compiles: what counts the kernels that first launches compile, and warm_shapes: steps to launch before the
    first request, as (requests, branches of the widest), from device and most rows; None where none are.
    """

    ops: Ops
    cache: type[Cache]
    choose: Callable[..., Choice]
    graphs: bool = False
    compiles: Callable[[], Compiles] | None = None
    warm_shapes: Callable[[torch.device, int], list[tuple[int, int]]] | None = None


PAIR = 1, 2
"""A request with two branches, which has all that a step may have."""


def one_pair(device: torch.device, most: int) -> list[tuple[int, int]]:
    """The `warm_shapes` of a backend whose kernels are the same for steps of any shape."""
    return [PAIR]


TORCH = Backend(TORCH_OPS, PagedKV, choose)
"""The torch references, which a CPU decodes with."""
PLAIN = Backend(TORCH_OPS, DeviceKV, choose)
"""The torch references on any device: what its kernels are checked by, and slow."""
