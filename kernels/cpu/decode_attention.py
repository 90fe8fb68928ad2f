"""Attention of decoding rows: one query each, over all pages in use at once, on a CPU.

Each page in use is multiplied, as it lies in memory, with the query of the row that reads it; the scores of a
row's pages are then put side by side for one softmax, and its shares go back to the pages:

    s_j = q k_jᵀ,    p = softmax(s_1 … s_n),    o = Σ_j p_j v_j.

Only queries, scores and outputs are gathered, never a key or value; the second and further readers of a
shared page are multiplied with a copy of it. Between two layers' large products every operation costs its
dispatch from a cold cache, so places and buffers are made once for as long as the rows read the same pages.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..reference.causal_mask import HIDDEN, hidden_keys
from .block_pool import PagePool, Read
from .shared_blocks import Readers


@dataclass(frozen=True)
class _Product:
    """Some pages, and the rows that are multiplied with them: views of buffers.

    queries, found [pages · kv_heads, rows, width]; scores, shares the same with block_size instead of width.
    rows: which of all rows they are. read: see `PagePool.reader`.
    """

    read: Read
    queries: Tensor
    scores: Tensor
    shares: Tensor
    found: Tensor
    rows: slice


class Decoding:
    """What decodes in a step: who reads which page, and the buffers between the products.

    tokens [rows]: the rows' places in the batch. Outputs have `padding` rows more, copies of the last. Of the
    pool's pages views are kept, but not the pool: it keeps this, and its memory is to be free with its last
    reference.
    """

    def __init__(self, pool: PagePool, readers: Readers, tokens: Tensor, padding: int, heads: int) -> None:
        self._block_size, kv_heads, group = pool.block_size, pool.kv_heads, heads // pool.kv_heads
        own, more = pool.product_rows(group), pool.product_rows(readers.most * group)
        self._products, total = list[_Product](), 0
        self._buffers = _buffers(pool, readers, own, more)
        self._scored = self._buffers[1][:-1]
        cut = _cut(pool, readers, own, more)
        for pages, count, rows in cut:
            at = slice(total, total + count * kv_heads * rows)
            queries, scores, shares, found = (x[at].unflatten(0, (-1, rows)) for x in self._buffers)
            read = pool.reader(pages, alone=len(cut) == 1)
            self._products.append(_Product(read, queries, scores, shares, found, at))
            total = at.stop
        place = _place(readers, own, more, kv_heads, group)  # [depth, rows, kv_heads, group]
        there = ~readers.absent
        place = torch.where(there[:, :, None, None], place, total)  # the row that no product writes
        depth, count = there.shape
        query = tokens[:, None] * (heads + 2 * kv_heads) + torch.arange(heads)
        part = torch.arange(place.numel()).view(count, kv_heads, group, depth).permute(3, 0, 1, 2)
        self._there, self._filled = there, place[there]
        self._asked = self._scattered(query.view(1, count, kv_heads, group).expand_as(place)[there], total)
        self._parted = self._scattered(part[there], total)
        self._gathered = place.permute(1, 2, 3, 0).flatten()
        last = torch.arange(count + padding).clamp(max=count - 1)
        self._out = place[:, last].flatten()
        self._shape = (depth, count + padding, heads, pool.width)

    def bias(self, lengths: Tensor, window: int | None) -> list[Tensor]:
        """0 where a product's row sees a key, else HIDDEN, for each product. lengths [rows]: tokens held."""
        depth = len(self._there)
        key = torch.arange(depth * self._block_size).view(depth, 1, -1)
        hidden = hidden_keys(key, lengths[:, None] - 1, window)[self._there]
        bias = torch.zeros_like(self._buffers[1])
        bias[self._filled] = hidden[:, None, None]
        return [bias[product.rows].view_as(product.scores) for product in self._products]

    def attend(self, layer: int, rows: Tensor, bias: list[Tensor]) -> Tensor:
        """rows: scaled queries, keys, values of the batch [·, width] → [rows + padding, heads, width]."""
        queries, scores, shares, found = self._buffers
        torch.index_select(rows, 0, self._asked, out=queries)
        for product, hidden in zip(self._products, bias, strict=True):
            keys = product.read(layer, 0).transpose(1, 2)
            torch.baddbmm(hidden, product.queries, keys, out=product.scores)
        depth, count, heads, width = self._shape
        if depth == 1:
            torch.softmax(self._scored, -1, out=shares)
        else:
            side_by_side = scores.index_select(0, self._gathered)
            side_by_side = side_by_side.view(-1, depth * self._block_size).softmax(-1)
            torch.index_select(side_by_side.view(-1, self._block_size), 0, self._parted, out=shares)
        for product in self._products:
            torch.bmm(product.shares, product.read(layer, 1), out=product.found)
        return pairwise_sum(found.index_select(0, self._out).view(depth, count, heads, width))

    def _scattered(self, values: Tensor, total: int) -> Tensor:
        """The values at the rows that are read; rows that only fill a product up have 0."""
        out = torch.zeros(total, dtype=torch.int64)
        out[self._filled] = values
        return out


def _buffers(pool: PagePool, readers: Readers, own: int, more: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, scores, shares and outputs of all products; of scores and outputs one row more.

    It stands for the pages that a row lacks: hidden scores, and an output of zeros.
    """
    total = (readers.used * own + len(readers.stacked) * more) * pool.kv_heads
    queries, shares = torch.empty(total, pool.width), torch.empty(total, pool.block_size)
    scores, found = torch.empty(total + 1, pool.block_size), torch.empty(total + 1, pool.width)
    scores[-1], found[-1] = HIDDEN, 0.0
    return queries, scores, shares, found


def _cut(pool: PagePool, readers: Readers, own: int, more: int) -> list[tuple[slice | Tensor, int, int]]:
    """(pages, how many, rows of a product with each) for every product."""
    size = pool.at_once
    starts = range(0, readers.used, size)
    spans = [(at, min(at + size, readers.used)) for at in starts]
    cut: list[tuple[slice | Tensor, int, int]] = [(slice(a, b), b - a, own) for a, b in spans]
    return cut + ([(readers.stacked, len(readers.stacked), more)] if len(readers.stacked) else [])


def _place(readers: Readers, own: int, more: int, kv_heads: int, group: int) -> Tensor:
    """Where each pair's queries stand among the rows of all products, [depth, rows, kv_heads, group]."""
    beyond = readers.pairs - readers.used
    copy, reader = beyond // max(1, readers.most), beyond % max(1, readers.most)
    stacked = (readers.used * own + copy * more) * kv_heads + reader * group
    first = torch.where(beyond < 0, readers.pairs * own * kv_heads, stacked)[..., None, None]
    step = torch.where(beyond < 0, own, more)[..., None, None]
    return first + step * torch.arange(kv_heads)[:, None] + torch.arange(group)


def pairwise_sum(x: Tensor) -> Tensor:
    """Σ x over the first dimension, neighbour with neighbour, so that zeros at the end change no bit.

    It is summed in x itself, which is lost. `sum(0)` rounds the columns that do not fill a vector in another
    way than the rest.
    """
    while len(x) > 1:
        x[:-1:2] += x[1::2]
        x = x[::2]
    return x[0]
