"""Attention over a paged KV cache, and the cache, on a CPU.

Keys and values live in pages of `block_size` tokens; a branch's page table says which are its own, in order,
and branches with a common head share pages. A page is also the tile that attention works in: softmax within
each page j, then over the pages,

    o = Σ_j a_j o_j,    o_j = softmax(s_j) v_j,    a = softmax over j of logsumexp(s_j).

A decoding step multiplies all pages at once, as they lie in memory from the first to the last in use, each
with the query of its branch: no key or value is gathered. So a cache that is dense at its beginning is fast;
`engine.blocks` keeps it so. The second and further readers of a shared page are stacked upon a copy of it.

Prompts go through the same products and sums, and a result depends neither on the neighbours nor on how the
prompt was cut. With the kernels that MKL has for AMD's CPUs and for Intel's with AVX512, the bits of a
float32 product of several matrices vary when a matrix has rows or columns that 4 or 8 do not divide, when it
stands alone with fewer than 12 rows, when it is scaled as it is made, and when it takes fewer than 400
multiplications, which torch then does itself; so none of that happens here. With those for AVX2 alone they
vary in other ways, and two runs of a request may then differ in a last bit.

Keys and values are held in the type of the model and multiplied in float32: a stretch of pages is widened
into a buffer, small enough to be read again from a processor's cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

from .layout import HIDDEN, Batch, Pieces, Readers, Seen, Segment, hidden_keys

ROWS, NARROW, ALONE, LEAST_WORK, COLUMNS, PAGE = 4, 64, 12, 400, 8, 16
"""What products must be of for their bits to be always the same: a multiple of rows (at least twice as many
where a row is wider than NARROW), rows of one that may stand alone, multiplications, a multiple of columns,
and of keys in a page."""
BUFFER = 1 << 20
"""Numbers that are widened at once."""


@dataclass
class _Step:
    """What the layers of one step share: where tokens go, who decodes and what each may see.

    write [tokens · 2 · kv_heads]: rows of a layer's pages, seen as [rows, head_dim]. decode: the tokens that
    decode, and `lengths` [rows] with them. prompts: (first token, segment). seen: by window.
    """

    write: Tensor
    decode: Tensor
    lengths: Tensor
    readers: Readers | None
    prompts: list[tuple[int, Segment]]
    seen: dict[int | None, Seen] = field(default_factory=dict)


class PagedKV:
    """The KV cache of one engine on a CPU.

    pages: [layers, 2, pages, kv_heads, block_size, width], keys then values; width is head_dim with zeros up
    to a multiple of 8; block_size is one of 16. Memory that is never used is never touched. A page must be
    cleared before its first use: a hidden key has weight 0, and 0 times a NaN that another branch left is
    NaN. Call `begin` once a step, then `attend` once a layer.
    """

    def __init__(
        self,
        layers: int,
        pages: int,
        block_size: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        assert block_size % PAGE == 0, "block_size is not a multiple of 16"
        self.block_size, self.kv_heads, self.head_dim = block_size, kv_heads, head_dim
        self._width = _width(head_dim)
        page = (kv_heads, block_size, self._width)
        self.pages = torch.empty(layers, 2, max(pages, 2), *page, dtype=dtype)
        self._buffer = torch.empty(2, max(2, BUFFER // (2 * math.prod(page))), *page)
        self._scale = head_dim**-0.5
        few = ROWS if self._width <= NARROW else 2 * ROWS
        self._least = -(-LEAST_WORK // (block_size * self._width * few)) * few  # rows of a product
        self._step: _Step | None = None
        self._tables: list[list[int]] = []
        self._readers: Readers | None = None

    @staticmethod
    def page_bytes(
        layers: int, block_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype = torch.float32
    ) -> int:
        """What one page takes."""
        return layers * 2 * kv_heads * block_size * _width(head_dim) * dtype.itemsize

    def clear(self, pages: list[int]) -> None:
        """Makes pages fit for new tokens."""
        if pages:
            self.pages.index_fill_(2, torch.tensor(pages), 0.0)

    def swap(self, pairs: Iterable[tuple[int, int]]) -> None:
        """Exchanges what pages hold, two by two, one after the other."""
        for one, other in pairs:
            self.pages[:, :, [one, other]] = self.pages[:, :, [other, one]]

    def begin(self, batch: Batch) -> None:
        """Prepares a step: builds what its layers share."""
        decode, prompts, first = list[int](), list[tuple[int, Segment]](), 0
        tables, lengths = list[list[int]](), list[int]()
        for segment in batch.segments:
            if segment.count == 1:
                decode.append(first)
                tables.append(segment.pages[: segment.start // self.block_size + 1])
                lengths.append(segment.start + 1)
            else:
                prompts.append((first, segment))
            first += segment.count
        self._step = _Step(
            write=self._write(batch),
            decode=torch.tensor(decode, dtype=torch.int64),
            lengths=torch.tensor(lengths),
            readers=self._read_by(tables) if tables else None,
            prompts=prompts,
        )

    def attend(self, layer: int, qkv: Tensor, window: int | None = None) -> Tensor:
        """Stores keys and values, and returns softmax(q kᵀ / √head_dim) v over each branch's context.

        qkv [tokens, heads + 2 · kv_heads, head_dim] float32, queries first, then keys, then values
        → [tokens, heads · head_dim]. With a window, a token sees itself and the window − 1 before it.
        """
        more = self._width - self.head_dim
        if not more:
            return self._attend(layer, qkv, window).flatten(1)
        return self._attend(layer, pad(qkv, (0, more)), window)[..., :-more].flatten(1)

    def _attend(self, layer: int, qkv: Tensor, window: int | None) -> Tensor:
        step, pages = self._step, self.pages[layer]
        assert step is not None, "attend before begin"
        heads = qkv.shape[1] - 2 * self.kv_heads
        stored = qkv[:, heads:].to(pages.dtype).reshape(-1, self._width)
        pages.view(-1, self._width).index_copy_(0, step.write, stored)
        if window not in step.seen:
            step.seen[window] = self._see(step, heads, window)
        seen, rows = step.seen[window], qkv.view(-1, self._width)
        if not step.prompts:
            return self._decode(pages, rows, step, seen)
        out = qkv.new_empty(len(qkv), heads, self._width)
        if step.readers:
            out.index_copy_(0, step.decode, self._decode(pages, rows, step, seen))
        for pieces, asked in seen.pieces:
            queries = self._queries(rows, asked)
            out.index_copy_(0, pieces.target, self._prompt(pages, queries, pieces, seen.group))
        return out

    def _decode(self, pages: Tensor, rows: Tensor, step: _Step, seen: Seen) -> Tensor:
        """rows: queries, keys and values of all tokens → [decoding rows, heads, width]."""
        readers = step.readers
        assert readers is not None
        group, deep = seen.group, len(readers.pairs) > 1
        asked = self._queries(rows, seen.asked).view(*seen.bias.shape[:2], -1, self._width)
        found = [x[:, :, :group] for x in self._owned(asked, pages[:, : readers.used], seen.bias, deep)]
        if len(readers.stacked):
            asked = self._queries(rows, seen.stacked).view(*seen.stacked_bias.shape[:3], self._width)
            held = pages.index_select(1, readers.stacked).float()
            size = len(readers.others) // len(readers.stacked) * group
            more = [x[:, :, :size] for x in _attend(asked, held, seen.stacked_bias, deep)]
            by_reader = [x.unflatten(2, (-1, group)).transpose(1, 2).flatten(0, 1) for x in more]
            found = [torch.cat(parts) for parts in zip(found, by_reader, strict=True)]
        own = [x.index_select(0, readers.pairs.flatten()) for x in found]
        if not deep:
            return own[0].flatten(1, 2)
        out, level = (x.unflatten(0, readers.pairs.shape) for x in own)
        return _merge(out, level.masked_fill_(readers.absent, 2 * HIDDEN)).flatten(1, 2)

    def _owned(self, asked: Tensor, pages: Tensor, bias: Tensor, deep: bool) -> list[Tensor]:
        """What `_attend` gives for pages of any type, a buffer at a time."""
        if pages.dtype == torch.float32:
            return _attend(asked, pages, bias, deep)
        size = self._buffer.shape[1]
        found = [
            _attend(q, self._buffer[:, : some.shape[1]].copy_(some), hidden, deep)
            for q, some, hidden in zip(asked.split(size), pages.split(size, 1), bias.split(size), strict=True)
        ]
        return found[0] if len(found) == 1 else [torch.cat(parts) for parts in zip(*found, strict=True)]

    def _queries(self, rows: Tensor, at: Tensor) -> Tensor:
        """Some rows, scaled. A product's own factor would be rounded here on one road, there on another."""
        return rows.index_select(0, at).mul_(self._scale)

    def _prompt(self, pages: Tensor, queries: Tensor, pieces: Pieces, group: int) -> Tensor:
        """queries [pieces · kv_heads · rows of a product, width] → [the pieces' own tokens, heads, width]."""
        count, heads, depth = pieces.count, self.kv_heads, pieces.depth
        queries = queries.view(len(pieces.hidden) * heads, -1, self._width)
        held = pages.index_select(1, pieces.pages).float().unflatten(1, (-1, depth)).transpose(2, 3)
        keys, values = held.flatten(1, 2).unbind(0)  # [pieces · kv_heads, depth, block_size, width]
        scores = torch.bmm(queries, keys.flatten(1, 2).transpose(1, 2))
        seen = scores[:, : count * group, pieces.first :].unflatten(1, (count, group))
        seen.unflatten(0, (-1, heads)).add_(pieces.hidden)
        scores = scores.unflatten(2, (depth, -1))
        shares = scores.softmax(-1)
        if depth == 1:
            merged = torch.bmm(shares[:, :, 0], values[:, 0])
        else:
            out = torch.stack(
                [torch.bmm(p.transpose(0, 1), v) for p, v in zip(shares, values, strict=True)], 1
            )
            merged = _merge(out, _level(scores, shares).permute(2, 0, 1))
        by_token = merged[:, : count * group].unflatten(1, (count, group)).unflatten(0, (-1, heads))
        found: Tensor = by_token.transpose(1, 2).flatten(0, 1).flatten(1, 2).index_select(0, pieces.own)
        return found

    def _see(self, step: _Step, heads: int, window: int | None) -> Seen:
        """What the tokens of a step see through a window."""
        group = heads // self.kv_heads
        pieces = [
            (some, self._asked(some.tokens.view(-1, some.count), group, ALONE).flatten())
            for some in Pieces.cut(step.prompts, self.block_size, heads, window)
        ]
        readers = step.readers
        if readers is None:
            none = torch.empty(0)
            return Seen(group, none, none, none, none, pieces)
        key = readers.start[:, None] + torch.arange(self.block_size)
        hidden = hidden_keys(key, step.lengths[readers.row][:, None] - 1, window)
        owners, others = hidden[: readers.used], hidden[readers.used :]
        token = step.decode[readers.row]
        asked = self._asked(token[: readers.used, None], group)
        stacked = self._asked(token[readers.used :].view(max(1, len(readers.stacked)), -1), group)
        of_head = others.view(max(1, len(readers.stacked)), -1, self.block_size).repeat_interleave(group, 1)
        filled = pad(of_head, (0, 0, 0, stacked.shape[2] - of_head.shape[1]))
        return Seen(
            group=group,
            asked=asked.flatten(),
            stacked=stacked.flatten(),
            bias=owners[:, None, None].expand(-1, self.kv_heads, -1, -1).contiguous(),
            stacked_bias=filled[:, None].expand(-1, self.kv_heads, -1, -1).contiguous(),
            pieces=pieces,
        )

    def _asked(self, tokens: Tensor, group: int, least: int = 0) -> Tensor:
        """Where the queries of some tokens stand: [n, count] → rows of qkv, [n, kv_heads, rows of a product].

        A product has as many rows as it needs for its bits to be always the same; the last is repeated.
        """
        count = tokens.shape[1] * group
        rows = max(least, self._least, -(-count // ROWS) * ROWS)
        query = torch.arange(rows).clamp(max=max(0, count - 1))
        if not count:
            return tokens.new_empty(len(tokens), self.kv_heads, 0)
        head = torch.arange(self.kv_heads)[:, None] * group + query % group
        all_heads = self.kv_heads * (group + 2)
        return tokens[:, None, query // group] * all_heads + head

    def _read_by(self, tables: list[list[int]]) -> Readers:
        """The readers of these page tables; those of the step before when nothing changed."""
        if self._readers is None or tables != self._tables:
            self._readers = Readers.of(tables, self.block_size, self._least)
            self._tables = tables
        return self._readers

    def _write(self, batch: Batch) -> Tensor:
        pages, heads = self.pages.shape[2], self.kv_heads
        side = torch.arange(2).view(1, 2, 1) * pages
        head = torch.arange(heads).view(1, 1, heads)
        row = (side + batch.pages.view(-1, 1, 1)) * heads + head
        return (row * self.block_size + batch.offsets.view(-1, 1, 1)).flatten()


def _width(head_dim: int) -> int:
    return -(-head_dim // COLUMNS) * COLUMNS


def _attend(q: Tensor, pages: Tensor, bias: Tensor, deep: bool) -> list[Tensor]:
    """[softmax(s) v] within each page, s = q kᵀ + bias; with `deep`, to merge them, logsumexp(s) too.

    q [pages, kv_heads, rows, width]; pages: k and v [2, pages, kv_heads, block_size, width]; bias that of s.
    """
    shape = q.shape[:2]
    q, k, v, bias = (x.flatten(0, 1) for x in (q, *pages, bias))
    scores = torch.baddbmm(bias, q, k.transpose(1, 2))
    shares = scores.softmax(-1)
    found = [torch.bmm(shares, v)] + ([_level(scores, shares)] if deep else [])
    return [x.unflatten(0, shape) for x in found]


def _level(scores: Tensor, shares: Tensor) -> Tensor:
    """logsumexp(scores) over the last dimension, where shares = softmax(scores): the largest share is 1/Σ."""
    return scores.amax(-1) - shares.amax(-1).log_()


def _merge(out: Tensor, level: Tensor) -> Tensor:
    """Σ_j softmax_j(level) out over the first dimension: [depth, …, head_dim], [depth, …] → […, head_dim]."""
    share = (level - level.amax(0)).exp_()
    return _sum(out * share[..., None]) / _sum(share)[..., None]


def _sum(x: Tensor) -> Tensor:
    """Σ x over the first dimension, neighbour with neighbour, so that zeros at the end change no bit.

    `sum(0)` and `softmax(0)` round the columns that do not fill a vector in another way than the rest.
    """
    while len(x) > 1:
        pairs = x[:-1:2] + x[1::2]
        x = torch.cat((pairs, x[-1:])) if len(x) % 2 else pairs
    return x[0]
