"""The protocol through which a decoder reads its weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor


class WeightSource(Protocol):
    """A source of weight tensors, such as a `Checkpoint` or `DummyWeights`."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def validate(
        self, expected: Mapping[str, tuple[int, ...]], ignored: frozenset[str] = frozenset()
    ) -> None: ...

    def get_tensor(self, name: str, slices: tuple[slice, ...] | None = None) -> Tensor: ...
