"""Which KV blocks are shared by several decoding sequences."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BlockSharing:
    """Which page is read for which decoding row; a pair is one page read for one row.

    num_blocks:    pages [0, used) are multiplied, each for its first reader.
    shared_blocks: pages [n] that more rows read, each multiplied for `max_extra_readers` of them.
    read_index:   [depth, rows]: for each row its pages in order; a page below `num_blocks` for its first
    reader, and
             used + index · most + place among the others of a stacked page. 0 where a row has no more pages.
    pad_mask:  [depth, rows]: where it has none.
    """

    num_blocks: int
    shared_blocks: Tensor
    max_extra_readers: int
    read_index: Tensor
    pad_mask: Tensor

    @classmethod
    def from_block_tables(cls, block_tables: list[list[int]]) -> BlockSharing:
        """tables: the pages of each row, in order."""
        num_blocks = max(2, 1 + max(map(max, block_tables)))  # two, so that no product stands alone
        assigned, extra_readers = set[int](), dict[int, list[tuple[int, int]]]()
        for row, block_table in enumerate(block_tables):
            for index, block in enumerate(block_table):
                if block in assigned:
                    extra_readers.setdefault(block, []).append((row, index))
                assigned.add(block)
        max_extra_readers = max(map(len, extra_readers.values()), default=0)
        max_blocks = max(map(len, block_tables))
        read_index = [
            [table[i] if i < len(table) else 0 for table in block_tables] for i in range(max_blocks)
        ]
        for shared_index, readers in enumerate(extra_readers.values()):
            for reader_index, (row, index) in enumerate(readers):
                read_index[index][row] = num_blocks + shared_index * max_extra_readers + reader_index
        return cls(
            num_blocks=num_blocks,
            shared_blocks=torch.tensor(list(extra_readers), dtype=torch.int64),
            max_extra_readers=max_extra_readers,
            read_index=torch.tensor(read_index),
            pad_mask=torch.tensor([[i >= len(table) for table in block_tables] for i in range(max_blocks)]),
        )
