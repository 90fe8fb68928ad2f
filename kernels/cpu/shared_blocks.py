"""Plan of which decoding rows read which KV blocks, including shared ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class BlockSharing:
    """Which KV block each decoding row reads; a read is one block for one row.

    num_blocks: blocks [0, num_blocks) are multiplied, each with the queries of its first reader.
    shared_blocks [n]: blocks with further readers, each multiplied with those of `max_extra_readers` rows.
    read_index [max_blocks, rows]: each row's reads in block order: the block id for the block's first reader,
        num_blocks + (index in shared_blocks) · max_extra_readers + (index of the extra reader) for the
        others, 0 beyond the row's last block.
    pad_mask [max_blocks, rows]: true beyond the row's last block.
    """

    num_blocks: int
    shared_blocks: Tensor
    max_extra_readers: int
    read_index: Tensor
    pad_mask: Tensor

    @classmethod
    def from_block_tables(cls, block_tables: list[list[int]]) -> BlockSharing:
        """Plan the reads of rows with these block tables, each a list of block ids in order."""
        num_blocks = max(2, 1 + max(map(max, block_tables)))  # no matmul may be a batch of one
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
