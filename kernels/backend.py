"""What the operations of a step run on: one value that names the implementation of each."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from .attention import PagedKV
from .ops import TORCH as TORCH_OPS
from .ops import Ops
from .steer import Choice, steer

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from .layout import Batch


class Cache(Protocol):
    """A paged KV cache; see `attention.PagedKV` for what its methods do."""

    pages: Tensor
    block_size: int

    def __init__(
        self, layers: int, pages: int, block_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> None: ...

    @staticmethod
    def page_bytes(layers: int, block_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> int: ...

    def begin(self, batch: Batch) -> None: ...

    def attend(self, layer: int, qkv: Tensor, window: int | None = None) -> Tensor: ...

    def clear(self, pages: list[int]) -> None: ...

    def swap(self, pairs: Iterable[tuple[int, int]]) -> None: ...


@dataclass(frozen=True)
class Backend:
    """The decoder's operations, the cache that they attend over, and the steering step."""

    ops: Ops
    cache: type[Cache]
    steer: Callable[..., Choice]


TORCH = Backend(TORCH_OPS, PagedKV, steer)
"""The torch references, which a CPU decodes with."""
