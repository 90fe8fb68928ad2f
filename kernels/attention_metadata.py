"""Ragged batch of one step: the sequence chunks and their slots in the paged KV cache."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .common.transfer import CPU, to_device


@dataclass(frozen=True)
class SequenceChunk:
    """One branch's tokens in a step: `num_new` new tokens after `num_computed` cached ones.

    block_table: the branch's block ids in order, enough for the new tokens too.
    """

    num_computed: int
    num_new: int
    block_table: list[int]


@dataclass(frozen=True)
class RaggedBatch:
    """The ragged layout of one step: the tokens of all chunks, one chunk after another.

    positions [rows]; block_ids, block_offsets [tokens]: the cache slot of each token's K and V. Rows beyond
    the tokens are padding: they repeat the last position, are not written to the cache, and have no meaning.
    """

    chunks: list[SequenceChunk]
    positions: Tensor
    block_ids: Tensor
    block_offsets: Tensor

    @classmethod
    def from_chunks(
        cls, chunks: list[SequenceChunk], block_size: int, num_padding: int = 0, device: torch.device = CPU
    ) -> RaggedBatch:
        """Build the layout of `chunks`, in their order."""
        positions = [chunk.num_computed + i for chunk in chunks for i in range(chunk.num_new)]
        block_ids = [
            s.block_table[(s.num_computed + i) // block_size] for s in chunks for i in range(s.num_new)
        ]
        block_offsets = [p % block_size for p in positions]
        arrays = (positions + positions[-1:] * num_padding, block_ids, block_offsets)
        return cls(chunks, *to_device(device, *(np.array(array, np.int64) for array in arrays)))


def swap_blocks(blocks: Tensor, pairs: Iterable[tuple[int, int]]) -> None:
    """Swap the contents of each pair of blocks in turn, in blocks [layers, 2, num_blocks, …]."""
    for src, dst in pairs:  # by slices: a list of indices would copy element by element
        src_copy = blocks[:, :, src].clone()
        blocks[:, :, src] = blocks[:, :, dst]
        blocks[:, :, dst] = src_copy
