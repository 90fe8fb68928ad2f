"""A step over a paged cache: which tokens of which branches it has, and where in the pages they go."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .common.transfer import CPU, send


@dataclass(frozen=True)
class Segment:
    """One branch's share of a step: `count` new tokens after the `start` that its pages already hold.

    pages: its page table, long enough for the new tokens.
    """

    start: int
    count: int
    pages: list[int]


@dataclass(frozen=True)
class Batch:
    """The ragged layout of one step, tokens of one segment after another.

    positions [rows]; pages, offsets [tokens]: where in the cache each token's K and V go. Rows beyond the
    tokens are padding: they repeat the last position, are written nowhere, and mean nothing.
    """

    segments: list[Segment]
    positions: Tensor
    pages: Tensor
    offsets: Tensor

    @classmethod
    def of(
        cls, segments: list[Segment], block_size: int, padding: int = 0, device: torch.device = CPU
    ) -> Batch:
        """The layout of these segments, in their order."""
        positions = [s.start + i for s in segments for i in range(s.count)]
        pages = [s.pages[(s.start + i) // block_size] for s in segments for i in range(s.count)]
        offsets = [p % block_size for p in positions]
        columns = (positions + positions[-1:] * padding, pages, offsets)
        return cls(segments, *send(device, *(np.array(column, np.int64) for column in columns)))


def exchange(pages: Tensor, pairs: Iterable[tuple[int, int]]) -> None:
    """Exchanges what pages [layers, 2, pages, …] hold, two by two, one after the other."""
    for one, other in pairs:  # by slices: a list of indices would copy number by number
        held = pages[:, :, one].clone()
        pages[:, :, one] = pages[:, :, other]
        pages[:, :, other] = held
