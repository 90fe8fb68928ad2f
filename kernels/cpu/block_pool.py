"""The KV block pool of a CPU, and the batch-invariant shapes of its matrix products.

With the kernels that MKL has for AMD's CPUs and for Intel's with AVX512, the bits of a float32 product of
several matrices vary when a matrix has rows or columns that 4 or 8 do not divide, when it stands alone with
fewer than 12 rows, when it is scaled as it is made, and when it takes fewer than 400 multiplications, which
torch then does itself; so none of that happens here. With those for Intel's AVX2 alone they vary in other
ways, and two runs of a request may then differ in a last bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from ..attention_metadata import swap_blocks
from ..common.profiling import in_stage

ROW_MULTIPLE, NARROW_WIDTH, MIN_SINGLE_ROWS, MIN_GEMM_MULS, COLUMN_MULTIPLE, BLOCK_SIZE_MULTIPLE = (
    4,
    64,
    12,
    400,
    8,
    16,
)
"""What products must be of for their bits to be always the same: a multiple of rows (at least twice as many
where a row is wider than NARROW), rows of one that may stand alone, multiplications, a multiple of columns,
and of keys in a page."""
BUFFER_NUMEL = 1 << 21
"""Numbers that are widened to float32 at once: few enough to be read again from a processor's cache, and so
many that the widening is hardly ever cut, each piece of which the threads have to meet for."""

MIN_WORD_COPY_ROWS = 64
"""So many rows are written eight bytes at a time: torch moves numbers, and a view costs a microsecond."""

ReadKV = Callable[[int, int], Tensor]


class KVBlockPool:
    """Keys and values in pages of `block_size` tokens, held in the type of the model.

    blocks: [layers, 2, pages, kv_heads, block_size, width], keys then values; width is head_dim with zeros up
    to a multiple of 8; block_size is one of 16. Memory that is never used is never touched. A page must be
    cleared before its first use: a hidden key has weight 0, and 0 times a NaN that another branch left is
    NaN. blocks_per_gemm: how many pages the buffer holds.
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
        )  # rows of a product
        self._buffer = torch.empty(self.blocks_per_gemm * num_kv_heads, block_size, self.padded_head_dim)
        self._gemm_views = [layer.flatten(1, 2) for layer in self.blocks]  # [2, pages · kv_heads, …]
        self._token_rows = [layer.view(-1, self.padded_head_dim) for layer in self.blocks]
        self._word_rows = [rows.view(torch.int64) for rows in self._token_rows]

    @in_stage("cache")
    def write(self, layer: int, slots: Tensor, kv: Tensor) -> None:
        """Writes keys and values: kv [rows, …, width] to `slots` of a layer, seen as [rows, width]."""
        data = kv.to(self.blocks.dtype).reshape(-1, self.padded_head_dim)
        if len(slots) < MIN_WORD_COPY_ROWS:
            self._token_rows[layer].index_copy_(0, slots, data)
        else:
            self._word_rows[layer].index_copy_(0, slots, data.view(torch.int64))

    def block_view(self, block_ids: slice | Tensor, exclusive: bool) -> ReadKV:
        """How a product has the keys (side 0) and values (side 1) of some pages, [pages · kv_heads, …].

        read(layer, side) gives float32 [pages · kv_heads, block_size, width], keys before values, and what it
        gives holds until anything else is read. exclusive: nothing else is, between a layer's keys and
        values.
        """
        if isinstance(block_ids, Tensor):
            blocks = self.blocks  # not this object: what it holds may hold what is returned
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
        """Rows of a product for `num_rows` of them to have the same bits always."""
        return max(min_rows, self._min_gemm_rows, -(-num_rows // ROW_MULTIPLE) * ROW_MULTIPLE)

    def zero_blocks(self, block_ids: list[int]) -> None:
        """Makes pages fit for new tokens."""
        if block_ids:
            self.blocks.index_fill_(2, torch.tensor(block_ids), 0.0)

    def swap_blocks(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Exchanges what pages hold, two by two, one after the other."""
        swap_blocks(self.blocks, pairs)


def pad_head_dim(head_dim: int) -> int:
    """head_dim with the zeros that a product needs."""
    return -(-head_dim // COLUMN_MULTIPLE) * COLUMN_MULTIPLE
