"""Attention over a paged KV cache, and the cache, on a CPU.

Keys and values live in pages of `block_size` tokens; a branch's page table says which are its own, in order,
and branches with a common head share pages. A page is also the tile that attention works in: softmax within
each page j, then over the pages,

    o = Σ_j a_j o_j,    o_j = softmax(s_j) v_j,    a = softmax over j of logsumexp(s_j).

A decoding step multiplies all pages at once, as they lie in memory from the first to the last in use, each
with the query of its branch: no key or value is gathered. So a cache that is dense at its beginning is fast;
`engine.blocks` keeps it so. The second and further readers of a shared page are stacked upon a copy
of it. Prompts go through the same products and sums, and a result depends neither on the neighbours nor on
how the prompt was cut: seen on CPUs of Intel and AMD, the bits of a float32 product of several matrices vary
when a matrix has rows or columns that 4 or 8 do not divide, when it stands alone with fewer than 12 rows, and
when it takes fewer than 400 multiplications, which torch then does itself. So none of that happens here.

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

HIDDEN = -1e30
"""The score of a key that may not be seen; finite, so that a page with no visible key makes no NaN."""
ROWS, ALONE, LEAST_WORK, COLUMNS, PAGE = 4, 12, 400, 8, 16
"""What products must be of for their bits to be always the same: a multiple of rows, rows of one that may
stand alone, multiplications, a multiple of columns, and of keys in a page."""
BUFFER = 1 << 20
"""Numbers that are widened at once."""
SCORES = 1 << 21
"""Scores of a prompt's tokens that are worked on at once: they and what becomes of them stay in a cache."""


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

    positions [tokens]; pages, offsets [tokens]: where in the cache each token's K and V go.
    """

    segments: list[Segment]
    positions: Tensor
    pages: Tensor
    offsets: Tensor

    @classmethod
    def of(cls, segments: list[Segment], block_size: int) -> Batch:
        """The layout of these segments, in their order."""
        positions = [s.start + i for s in segments for i in range(s.count)]
        pages = [s.pages[(s.start + i) // block_size] for s in segments for i in range(s.count)]
        where = torch.tensor([positions, pages, [p % block_size for p in positions]])
        return cls(segments, *where.unbind(0))


@dataclass
class _Readers:
    """Which page is read for which decoding row; a pair is one page read for one row.

    used:    pages [0, used) are multiplied, each for `owner` [used], its first reader.
    stacked: pages [n] that more rows read, and `others` [n · most], those rows, padded by repetition.
    pairs:   [depth, rows]: for each row the pairs of its pages in order, first those of the owners, by page,
             then the others; padded by the row's first. absent [depth, rows, 1, 1]: where it is padding.
    start:   [pairs]: position of the first key of each pair's page in its row's branch.
    row:     [pairs]: the row.
    """

    used: int
    owner: Tensor
    stacked: Tensor
    others: Tensor
    pairs: Tensor
    absent: Tensor
    start: Tensor
    row: Tensor

    @classmethod
    def of(cls, tables: list[list[int]], block_size: int, least: int) -> _Readers:
        """tables: the pages of each row, in order. least: readers of a stacked page that are made up."""
        used = max(2, 1 + max(map(max, tables)))  # two, so that no product stands alone
        owner, start = [0] * used, [0] * used
        taken, others = set[int](), dict[int, list[tuple[int, int]]]()
        for row, table in enumerate(tables):
            for index, page in enumerate(table):
                if page in taken:
                    others.setdefault(page, []).append((row, index))
                else:
                    taken.add(page)
                    owner[page], start[page] = row, index * block_size
        most = max(least, *map(len, others.values())) if others else 0
        place: dict[tuple[int, int], int] = {}
        rows = list(owner)
        for readers in others.values():
            for at in range(most):
                row, index = readers[min(at, len(readers) - 1)]
                place.setdefault((row, index), len(rows))
                rows.append(row)
                start.append(index * block_size)
        depth = max(map(len, tables))
        pairs = [[place.get((r, i), page) for i, page in enumerate(t)] for r, t in enumerate(tables)]
        absent = [[i >= len(t) for t in tables] for i in range(depth)]
        return cls(
            used=used,
            owner=torch.tensor(owner),
            stacked=torch.tensor(list(others), dtype=torch.int64),
            others=torch.tensor(rows[used:], dtype=torch.int64),
            pairs=torch.tensor([[t[i] if i < len(t) else t[0] for t in pairs] for i in range(depth)]),
            absent=torch.tensor(absent).view(depth, -1, 1, 1),
            start=torch.tensor(start),
            row=torch.tensor(rows),
        )


@dataclass
class _Pieces:
    """Pieces of prompts that attend together, padded to the same numbers of tokens and pages.

    tokens [pieces · count]: tokens of the batch, the last of a piece repeated. own: which of them are no
    repetition, `target` the tokens that they are. pages [pieces · n]. hidden [pieces, 1, count, 1, keys]: 0
    for a key that is seen, else HIDDEN, for the keys from `first` on; all before are seen.
    """

    count: int
    tokens: Tensor
    own: Tensor
    target: Tensor
    pages: Tensor
    first: int
    hidden: Tensor

    @classmethod
    def cut(
        cls, prompts: list[tuple[int, Segment]], block_size: int, heads: int, window: int | None
    ) -> list[_Pieces]:
        """prompts: (first token, segment). Pieces are short enough for their scores to stay in a cache."""
        alike: dict[tuple[int, int], list[tuple[int, int, int, list[int]]]] = {}
        for at, segment in prompts:
            end, done = segment.start + segment.count, 0
            while done < segment.count:
                start = segment.start + done
                most = max(1, SCORES // (heads * end))
                count = min(most, segment.count - done)
                lowest = 0 if window is None else max(0, start - window + 1) // block_size
                pages = segment.pages[lowest : (start + count - 1) // block_size + 1]
                size = min(most, 1 << (count - 1).bit_length())
                piece = (at + done, start - lowest * block_size, count, pages)
                alike.setdefault((len(pages), size), []).append(piece)
                done += count
        return [
            cls._of(pieces[at : at + step], size, block_size, window)
            for (depth, size), pieces in alike.items()
            for step in (max(1, SCORES // (heads * size * depth * block_size)),)
            for at in range(0, len(pieces), step)
        ]

    @classmethod
    def _of(
        cls, pieces: list[tuple[int, int, int, list[int]]], size: int, block_size: int, window: int | None
    ) -> _Pieces:
        """pieces: (first token, its place among the keys, tokens, pages)."""
        places = [at * size + i for at, (_, _, count, _) in enumerate(pieces) for i in range(count)]
        first = (
            0 if window is not None else min(start for _, start, _, _ in pieces) // block_size * block_size
        )
        steps = torch.arange(size)
        starts = torch.tensor([start for _, start, _, _ in pieces])[:, None]
        last = torch.tensor([count - 1 for _, _, count, _ in pieces])[:, None]
        reach = torch.minimum(steps, last)
        key = torch.arange(first, len(pieces[0][3]) * block_size)
        tokens = (torch.tensor([token for token, _, _, _ in pieces])[:, None] + reach).flatten()
        own = torch.tensor(places)
        return cls(
            count=size,
            tokens=tokens,
            own=own,
            target=tokens[own],
            pages=torch.tensor([page for _, _, _, pages in pieces for page in pages]),
            first=first,
            hidden=_hidden(key, (starts + reach)[:, :, None], window)[:, None, :, None],
        )


@dataclass
class _Step:
    """What the layers of one step share: where tokens go, who decodes and what each may see.

    write [tokens · 2 · kv_heads]: rows of a layer's pages, seen as [rows, head_dim]. decode: the tokens that
    decode, and `lengths` [rows] with them. prompts: (first token, segment). By window: `bias`, see `_bias`,
    and the `pieces` that the prompts are cut into.
    """

    write: Tensor
    decode: Tensor
    lengths: Tensor
    readers: _Readers | None
    prompts: list[tuple[int, Segment]]
    bias: dict[int | None, tuple[Tensor, Tensor]] = field(default_factory=dict)
    pieces: dict[int | None, list[_Pieces]] = field(default_factory=dict)


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
        self._least = -(-LEAST_WORK // (block_size * self._width * ROWS)) * ROWS  # rows of a product
        self._step: _Step | None = None
        self._tables: list[list[int]] = []
        self._readers: _Readers | None = None

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

    def attend(self, layer: int, q: Tensor, kv: Tensor, window: int | None = None) -> Tensor:
        """Stores kv and returns softmax(q kᵀ / √head_dim) v over each branch's context, causally.

        q [tokens, heads, head_dim], kv [tokens, 2 · kv_heads, head_dim], keys first, both float32
        → [tokens, heads · head_dim]. With a window, a token sees itself and the window − 1 before it.
        """
        more = self._width - self.head_dim
        if not more:
            return self._attend(layer, q, kv, window).flatten(1)
        return self._attend(layer, pad(q, (0, more)), pad(kv, (0, more)), window)[..., :-more].flatten(1)

    def _attend(self, layer: int, q: Tensor, kv: Tensor, window: int | None) -> Tensor:
        step, pages = self._step, self.pages[layer]
        assert step is not None, "attend before begin"
        stored = kv.reshape(-1, self._width).to(pages.dtype)
        pages.view(-1, self._width).index_copy_(0, step.write, stored)
        q = q * self._scale
        if not step.prompts:
            return self._decode(pages, q, step, window)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        if step.readers:
            out[step.decode] = self._decode(pages, q[step.decode], step, window)
        if window not in step.pieces:
            step.pieces[window] = _Pieces.cut(step.prompts, self.block_size, q.shape[1], window)
        for pieces in step.pieces[window]:
            out.index_copy_(0, pieces.target, self._prompt(pages, q, pieces))
        return out

    def _decode(self, pages: Tensor, q: Tensor, step: _Step, window: int | None) -> Tensor:
        """q [rows, heads, head_dim] → the same: one new token for every decoding row."""
        readers = step.readers
        assert readers is not None
        group, deep = q.shape[1] // self.kv_heads, len(readers.pairs) > 1
        bias, stacked_bias = self._bias(step, readers, window, group)
        queries = q.view(len(q), self.kv_heads, group, -1)
        asked = self._padded(queries).index_select(0, readers.owner)
        found = [x[:, :, :group] for x in self._owned(asked, pages[:, : readers.used], bias, deep)]
        if len(readers.stacked):
            more = self._stacked(pages, queries, readers, stacked_bias, deep)
            found = [torch.cat(parts) for parts in zip(found, more, strict=True)]
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

    def _stacked(
        self, pages: Tensor, queries: Tensor, readers: _Readers, bias: Tensor, deep: bool
    ) -> list[Tensor]:
        """What `_attend` gives for the second and further readers of pages, reader by reader."""
        group = queries.shape[2]
        asked = queries.index_select(0, readers.others).unflatten(0, (len(readers.stacked), -1))
        rows = self._padded(asked.transpose(1, 2).flatten(2, 3))
        found = _attend(rows, pages.index_select(1, readers.stacked).float(), bias, deep)
        size = asked.shape[1] * group
        return [x[:, :, :size].unflatten(2, (-1, group)).transpose(1, 2).flatten(0, 1) for x in found]

    def _prompt(self, pages: Tensor, q: Tensor, pieces: _Pieces) -> Tensor:
        """q [tokens, heads, head_dim] → [the pieces' own tokens, heads, head_dim]."""
        count, heads, depth = (
            pieces.count,
            self.kv_heads,
            len(pieces.pages) * pieces.count // len(pieces.tokens),
        )
        group = q.shape[1] // heads
        asked = q.index_select(0, pieces.tokens).view(-1, count, heads, group, q.shape[-1])
        queries = self._padded(asked.transpose(1, 2).flatten(2, 3), ALONE)  # [pieces, kv_heads, rows, width]
        held = pages.index_select(1, pieces.pages).float().unflatten(1, (-1, depth)).transpose(2, 3)
        keys, values = held.flatten(1, 2).unbind(0)  # [pieces · kv_heads, depth, block_size, width]
        scores = torch.bmm(queries.flatten(0, 1), keys.flatten(1, 2).transpose(1, 2))
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

    def _padded(self, x: Tensor, least: int = 0) -> Tensor:
        """x […, rows, columns] with as many rows as a product needs for its bits to be always the same."""
        rows = max(least, self._least, -(-x.shape[-2] // ROWS) * ROWS)
        return pad(x, (0, 0, 0, rows - x.shape[-2])) if rows > x.shape[-2] else x

    def _bias(self, step: _Step, readers: _Readers, window: int | None, group: int) -> tuple[Tensor, Tensor]:
        """0 for a key that is seen, else HIDDEN: for owners [used, kv_heads, 1, block_size], and for stacked
        readers [n, kv_heads, most · group, block_size]."""
        if window not in step.bias:
            key = readers.start[:, None] + torch.arange(self.block_size)
            hidden = _hidden(key, step.lengths[readers.row][:, None] - 1, window)
            owners, others = hidden[: readers.used], hidden[readers.used :]
            each = others.unflatten(0, (len(readers.stacked), -1)) if len(readers.stacked) else others[None]
            step.bias[window] = (
                owners[:, None, None].expand(-1, self.kv_heads, -1, -1).contiguous(),
                self._padded(each.repeat_interleave(group, 1))[:, None]
                .expand(-1, self.kv_heads, -1, -1)
                .contiguous(),
            )
        return step.bias[window]

    def _read_by(self, tables: list[list[int]]) -> _Readers:
        """The readers of these page tables; those of the step before when nothing changed."""
        if self._readers is None or tables != self._tables:
            self._readers = _Readers.of(tables, self.block_size, self._least)
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


def _hidden(key: Tensor, token: Tensor, window: int | None) -> Tensor:
    """0 where the token at a position sees the key at a position, else HIDDEN."""
    hidden = key > token
    if window is not None:
        hidden |= key <= token - window
    return torch.zeros(hidden.shape).masked_fill_(hidden, HIDDEN)


def _attend(q: Tensor, pages: Tensor, bias: Tensor, deep: bool) -> list[Tensor]:
    """[softmax(s) v] within each page, s = q kᵀ + bias; where they are to be merged also logsumexp(s).

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
