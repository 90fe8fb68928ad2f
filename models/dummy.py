"""A model without a checkpoint: random weights in its shape, for benches and to see what fits."""

from __future__ import annotations

from typing import TYPE_CHECKING
from zlib import crc32

import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

SPREAD = 0.02
"""The standard deviation of a weight, as models of this family are initialised."""


class DummyWeights:
    """Reads like a `Checkpoint` of these shapes: norms are 1, all else is normal noise around 0.

    Each tensor is made when it is asked for, on `device` and in `dtype`, and depends on seed and name alone.
    """

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        dtype: torch.dtype,
        device: torch.device,
        seed: int = 0,
    ) -> None:
        self.shapes = dict(shapes)
        self._dtype, self._device, self._seed = dtype, device, seed

    def require(self, expected: Mapping[str, tuple[int, ...]], ignored: frozenset[str] = frozenset()) -> None:
        """Nothing can be missing: the shapes are those of the config."""

    def tensor(self, name: str) -> Tensor:
        """The tensor of this name."""
        empty = torch.empty(self.shapes[name], dtype=self._dtype, device=self._device)
        if name.endswith("norm.weight"):
            return empty.fill_(1)
        seed = crc32(f"{self._seed} {name}".encode())
        generator = torch.Generator(self._device).manual_seed(seed)
        return empty.normal_(0, SPREAD, generator=generator)
