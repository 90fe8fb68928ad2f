"""The pages of a KV cache on a CPU, and the sizes of product at which their bits are always the same.

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

from ..attention_metadata import exchange

ROWS, NARROW, ALONE, LEAST_WORK, COLUMNS, PAGE = 4, 64, 12, 400, 8, 16
"""What products must be of for their bits to be always the same: a multiple of rows (at least twice as many
where a row is wider than NARROW), rows of one that may stand alone, multiplications, a multiple of columns,
and of keys in a page."""
BUFFER = 1 << 21
"""Numbers that are widened to float32 at once: few enough to be read again from a processor's cache, and so
many that the widening is hardly ever cut, each piece of which the threads have to meet for."""

WORDS = 64
"""So many rows are written eight bytes at a time: torch moves numbers, and a view costs a microsecond."""

Read = Callable[[int, int], Tensor]


class PagePool:
    """Keys and values in pages of `block_size` tokens, held in the type of the model.

    pages: [layers, 2, pages, kv_heads, block_size, width], keys then values; width is head_dim with zeros up
    to a multiple of 8; block_size is one of 16. Memory that is never used is never touched. A page must be
    cleared before its first use: a hidden key has weight 0, and 0 times a NaN that another branch left is
    NaN. at_once: how many pages the buffer holds.
    """

    def __init__(
        self, layers: int, pages: int, block_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype
    ) -> None:
        assert block_size % PAGE == 0, "block_size is not a multiple of 16"
        self.block_size, self.kv_heads, self.head_dim = block_size, kv_heads, head_dim
        self.width = padded_width(head_dim)
        page = (kv_heads, block_size, self.width)
        self.pages = torch.empty(layers, 2, max(pages, 2), *page, dtype=dtype)
        self.at_once = max(2, BUFFER // math.prod(page))
        few = ROWS if self.width <= NARROW else 2 * ROWS
        self._least = -(-LEAST_WORK // (block_size * self.width * few)) * few  # rows of a product
        self._buffer = torch.empty(self.at_once * kv_heads, block_size, self.width)
        self._products = [layer.flatten(1, 2) for layer in self.pages]  # [2, pages · kv_heads, …]
        self._tokens = [layer.view(-1, self.width) for layer in self.pages]
        self._words = [tokens.view(torch.int64) for tokens in self._tokens]

    def store(self, layer: int, rows: Tensor, parts: Tensor) -> None:
        """Writes keys and values: parts [rows, …, width] to `rows` of a layer, seen as [rows, width]."""
        written = parts.to(self.pages.dtype).reshape(-1, self.width)
        if len(rows) < WORDS:
            self._tokens[layer].index_copy_(0, rows, written)
        else:
            self._words[layer].index_copy_(0, rows, written.view(torch.int64))

    def reader(self, pages: slice | Tensor, alone: bool) -> Read:
        """How a product has the keys (side 0) and values (side 1) of some pages, [pages · kv_heads, …].

        read(layer, side) gives float32 [pages · kv_heads, block_size, width], keys before values, and what it
        gives holds until anything else is read. alone: nothing else is, between a layer's keys and values.
        """
        if isinstance(pages, Tensor):
            held = self.pages  # not this object: what it holds may hold what is returned
            return lambda layer, side: held[layer, side].index_select(0, pages).float().flatten(0, 1)
        at = slice(pages.start * self.kv_heads, pages.stop * self.kv_heads)
        lying = [layer[:, at] for layer in self._products]
        if self.pages.dtype == torch.float32:
            sides = [layer.unbind(0) for layer in lying]
            return lambda layer, side: sides[layer][side]
        count = at.stop - at.start
        if not alone or 2 * count > len(self._buffer):
            wide = self._buffer[:count]
            return lambda layer, side: wide.copy_(lying[layer][side])
        both: Tensor = self._buffer[: 2 * count].unflatten(0, (2, -1))
        keys_and_values: tuple[Tensor, ...] = both.unbind(0)

        def read(layer: int, side: int) -> Tensor:
            if side == 0:
                both.copy_(lying[layer])
            return keys_and_values[side]

        return read

    def product_rows(self, count: int, least: int = 0) -> int:
        """Rows of a product for `count` of them to have the same bits always."""
        return max(least, self._least, -(-count // ROWS) * ROWS)

    def clear(self, pages: list[int]) -> None:
        """Makes pages fit for new tokens."""
        if pages:
            self.pages.index_fill_(2, torch.tensor(pages), 0.0)

    def swap(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Exchanges what pages hold, two by two, one after the other."""
        exchange(self.pages, pairs)


def padded_width(head_dim: int) -> int:
    """head_dim with the zeros that a product needs."""
    return -(-head_dim // COLUMNS) * COLUMNS
