"""What a decoder asks of whatever holds its tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from torch import Tensor


class Weights(Protocol):
    """Where a decoder's tensors come from: a `Checkpoint`, or `DummyWeights`."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]: ...

    def require(
        self, expected: Mapping[str, tuple[int, ...]], ignored: frozenset[str] = frozenset()
    ) -> None: ...

    def tensor(self, name: str, part: tuple[slice, ...] | None = None) -> Tensor: ...
