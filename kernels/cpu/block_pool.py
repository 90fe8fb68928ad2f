"""CPU KV block pool, and the batch-invariant shapes of its matrix products.

With MKL's kernels for AMD CPUs and for Intel CPUs with AVX512, the bits of a batched float32 matmul vary when
a matrix has a row count that is not a multiple of 4 or a column count that is not a multiple of 8, when the
batch is a single matrix with fewer than 12 rows, when the matmul also scales, and when it takes fewer than
400 multiplications, which torch then does itself. This module avoids all of these. MKL's kernels for Intel
CPUs with AVX2 only vary in other ways: two runs of a request may then differ in the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ..attention_metadata import swap_blocks

ROW_MULTIPLE, NARROW_WIDTH, MIN_SINGLE_ROWS, MIN_GEMM_MULS, COLUMN_MULTIPLE, BLOCK_SIZE_MULTIPLE = (
    4,
    64,
    12,
    400,
    8,
    16,
)
"""Shapes of matmuls with reproducible bits: rows are a multiple of ROW_MULTIPLE (and at least twice that
where a row is wider than NARROW_WIDTH), at least MIN_SINGLE_ROWS where the matmul may be a batch of one, with
at least MIN_GEMM_MULS multiplications; columns are a multiple of COLUMN_MULTIPLE, and the keys of a block of
BLOCK_SIZE_MULTIPLE."""
BUFFER_NUMEL = 1 << 21
"""Elements converted to float32 at once: few enough to stay in the CPU's cache, and enough that the
conversion is rarely split, since the threads synchronise for each part."""
MIN_WORD_COPY_ROWS = 64
"""At least this many rows are written as int64 words: torch copies by element, and a view costs 1 µs."""

ReadKV = Callable[[int, int], Tensor]


class KVBlockPool:
    """Keys and values in blocks of `block_size` tokens, stored in the model's dtype.

    blocks: [layers, 2, num_blocks, kv_heads, block_size, width], keys then values; width is head_dim padded
    with zeros to a multiple of 8; block_size is a multiple of 16. Unused memory is never touched. A block
    must be zeroed before its first use: a masked key has weight 0, and 0 times a NaN left by another branch
    is NaN. blocks_per_gemm: capacity of the float32 buffer in blocks.
    """

    def __init__(
        self,
        num_layers: int,
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
    ) -> None:
        assert block_size % BLOCK_SIZE_MULTIPLE == 0, "block_size is not a multiple of 16"
        self.block_size, self.num_kv_heads, self.head_dim = block_size, num_kv_heads, head_dim
        self.padded_head_dim = pad_head_dim(head_dim)
        block_shape = (num_kv_heads, block_size, self.padded_head_dim)
        self.blocks = torch.empty(num_layers, 2, max(num_blocks, 2), *block_shape, dtype=dtype)
        self.blocks_per_gemm = max(2, BUFFER_NUMEL // math.prod(block_shape))
        row_multiple = ROW_MULTIPLE if self.padded_head_dim <= NARROW_WIDTH else 2 * ROW_MULTIPLE
        self._min_gemm_rows = (
            -(-MIN_GEMM_MULS // (block_size * self.padded_head_dim * row_multiple)) * row_multiple
        )
        self._buffer = torch.empty(self.blocks_per_gemm * num_kv_heads, block_size, self.padded_head_dim)
        self._gemm_views = [layer.flatten(1, 2) for layer in self.blocks]  # [2, num_blocks · kv_heads, …]
        self._token_rows = [layer.view(-1, self.padded_head_dim) for layer in self.blocks]
        self._word_rows = [rows.view(torch.int64) for rows in self._token_rows]

    def write(self, layer: int, slots: Tensor, kv: Tensor) -> None:
        """Write keys and values: kv [rows, …, width] to `slots`, rows of a layer viewed as [rows, width]."""
        data = kv.to(self.blocks.dtype).reshape(-1, self.padded_head_dim)
        if len(slots) < MIN_WORD_COPY_ROWS:
            self._token_rows[layer].index_copy_(0, slots, data)
        else:
            self._word_rows[layer].index_copy_(0, slots, data.view(torch.int64))

    def block_view(self, block_ids: slice | Tensor, exclusive: bool) -> ReadKV:
        """Make a reader of the keys (side 0) and values (side 1) of `block_ids`.

        read(layer, side) → float32 [num_blocks · kv_heads, block_size, width], valid until the next read of
        any reader. Read a layer's keys before its values. exclusive: no other reader is used between them.
        """
        if isinstance(block_ids, Tensor):
            blocks = self.blocks  # not self, which may own the reader: a cycle would delay freeing memory
            return lambda layer, side: blocks[layer, side].index_select(0, block_ids).float().flatten(0, 1)
        rows = slice(block_ids.start * self.num_kv_heads, block_ids.stop * self.num_kv_heads)
        views = [layer[:, rows] for layer in self._gemm_views]
        if self.blocks.dtype == torch.float32:
            kv_views = [layer.unbind(0) for layer in views]
            return lambda layer, side: kv_views[layer][side]
        num_rows = rows.stop - rows.start
        if not exclusive or 2 * num_rows > len(self._buffer):
            fp32_buffer = self._buffer[:num_rows]
            return lambda layer, side: fp32_buffer.copy_(views[layer][side])
        kv_buffer: Tensor = self._buffer[: 2 * num_rows].unflatten(0, (2, -1))
        kv: tuple[Tensor, ...] = kv_buffer.unbind(0)

        def read(layer: int, side: int) -> Tensor:
            if side == 0:
                kv_buffer.copy_(views[layer])
            return kv[side]

        return read

    def padded_gemm_rows(self, num_rows: int, min_rows: int = 0) -> int:
        """`num_rows` padded to a row count at which the bits of a matmul are reproducible."""
        return max(min_rows, self._min_gemm_rows, -(-num_rows // ROW_MULTIPLE) * ROW_MULTIPLE)

    def zero_blocks(self, block_ids: list[int]) -> None:
        """Zero the blocks, so that new tokens can be written to them."""
        if block_ids:
            self.blocks.index_fill_(2, torch.tensor(block_ids), 0.0)

    def swap_blocks(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Swap the contents of each pair of blocks in turn."""
        swap_blocks(self.blocks, pairs)


def pad_head_dim(head_dim: int) -> int:
    """head_dim rounded up to the column multiple of a matmul."""
    return -(-head_dim // COLUMN_MULTIPLE) * COLUMN_MULTIPLE
