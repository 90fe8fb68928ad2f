"""A step over the paged KV cache: which tokens of which branches, and which blocks they go to."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .common.transfer import CPU, to_device


@dataclass(frozen=True)
class SequenceChunk:
    """One branch's share of a step: `num_new` new tokens after the `num_computed` that its pages already
    hold.

    block_table: its page table, long enough for the new tokens.
    """

    num_computed: int
    num_new: int
    block_table: list[int]


@dataclass(frozen=True)
class RaggedBatch:
    """The ragged layout of one step, tokens of one segment after another.

    positions [rows]; block_ids, block_offsets [tokens]: where in the cache each token's K and V go. Rows
    beyond the tokens are padding: they repeat the last position, are written nowhere, and mean nothing.
    """

    chunks: list[SequenceChunk]
    positions: Tensor
    block_ids: Tensor
    block_offsets: Tensor

    @classmethod
    def from_chunks(
        cls, chunks: list[SequenceChunk], block_size: int, num_padding: int = 0, device: torch.device = CPU
    ) -> RaggedBatch:
        """The layout of these segments, in their order."""
        positions = [chunk.num_computed + i for chunk in chunks for i in range(chunk.num_new)]
        block_ids = [
            s.block_table[(s.num_computed + i) // block_size] for s in chunks for i in range(s.num_new)
        ]
        block_offsets = [p % block_size for p in positions]
        arrays = (positions + positions[-1:] * num_padding, block_ids, block_offsets)
        return cls(chunks, *to_device(device, *(np.array(array, np.int64) for array in arrays)))


def swap_blocks(blocks: Tensor, pairs: Iterable[tuple[int, int]]) -> None:
    """Exchanges what blocks [layers, 2, pages, …] hold, two by two, one after the other."""
    for src, dst in pairs:  # by slices: a list of indices would copy number by number
        src_copy = blocks[:, :, src].clone()
        blocks[:, :, src] = blocks[:, :, dst]
        blocks[:, :, dst] = src_copy
