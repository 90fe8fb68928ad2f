"""Attention over a paged KV cache, and the cache, on a CPU.

Keys and values live in pages of `block_size` tokens; a branch's page table says which are its own, in
order, and branches with a common head share pages. A page is also the tile that attention works in: its
keys and its values are one product each, summed over the pages neighbour with neighbour. Tokens that decode
read all pages in use as they lie in memory, see `kernels.cpu.decode_attention`, so a cache that is dense at
its beginning is fast; `engine.scheduling.block_manager` keeps it so. Prompts go through the same products
and sums a piece at a time, and a result depends neither on the neighbours nor on how the prompt was cut.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..attention_metadata import Batch, Segment
from ..reference.rms_norm import rms_norm
from ..reference.rotary import HeadNorm, Turns, rotate
from .block_pool import ALONE, PagePool, padded_width
from .decode_attention import Decoding, pairwise_sum
from .prefill_attention import Pieces, Prompts
from .shared_blocks import Readers


@dataclass
class _Seen:
    """What a step's tokens see through one window: the bias of each decoding product, and prompts in pieces.

    prompts: those that read the same pages, and for each of their pieces its rows of qkv.
    """

    bias: list[Tensor]
    prompts: list[tuple[Prompts, list[Tensor]]]


@dataclass
class _Step:
    """What the layers of one step share: where tokens go, who decodes and what each may see.

    write [tokens · 2 · kv_heads]: rows of a layer's pages, seen as [rows, width]. tables: pages of the rows
    that decode; decode, lengths [rows]: their tokens in the batch, and how many tokens each holds with it.
    prompts: (first token, segment). padding: rows of the batch beyond its tokens. seen: by window.
    """

    write: Tensor
    tokens: int
    padding: int
    tables: list[list[int]] = field(default_factory=list)
    decode: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    prompts: list[tuple[int, Segment]] = field(default_factory=list)
    seen: dict[int | None, _Seen] = field(default_factory=dict)


class PagedKV(PagePool):
    """The KV cache of one engine on a CPU: call `begin` once a step, then `attend` once a layer."""

    def __init__(
        self,
        layers: int,
        pages: int,
        block_size: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        assert device.type == "cpu", "this cache lies in the memory of a CPU"
        super().__init__(layers, pages, block_size, kv_heads, head_dim, dtype)
        self._step: _Step | None = None
        self._decoding: Decoding | None = None
        self._decoding_of: object = None

    @staticmethod
    def page_bytes(layers: int, block_size: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
        """What one page takes."""
        return layers * 2 * kv_heads * block_size * padded_width(head_dim) * dtype.itemsize

    def begin(self, batch: Batch) -> None:
        """Prepares a step."""
        tokens, rows, first = len(batch.pages), len(batch.positions), 0
        step = _Step(self._write(batch), tokens, rows - tokens)
        for segment in batch.segments:
            if segment.count == 1:
                step.decode.append(first)
                step.tables.append(segment.pages[: segment.start // self.block_size + 1])
                step.lengths.append(segment.start + 1)
            else:
                step.prompts.append((first, segment))
            first += segment.count
        self._step = step

    def attend(
        self,
        layer: int,
        qkv: Tensor,
        turns: Turns,
        norm: HeadNorm | None = None,
        window: int | None = None,
    ) -> Tensor:
        """Turns queries and keys, stores keys and values, and returns softmax(q kᵀ) v over each branch's
        context, [rows, heads · head_dim] float32.

        qkv [rows of the batch, heads + 2 · kv_heads, head_dim], queries first, then keys, then values, as the
        products give them; their memory may be used again. norm: of queries and keys, before they are turned.
        Queries get the factor 1/√head_dim as they are turned: a product's own factor would be rounded here on
        one road, there on another. With a window, a token sees itself and the window − 1 before it.
        """
        qkv, more = self.turn(qkv, turns, norm), self.width - self.head_dim
        if not more:
            return self._attend(layer, qkv, window).flatten(1)
        return self._attend(layer, pad(qkv, (0, more)), window)[..., :-more].flatten(1)

    def turn(self, qkv: Tensor, turns: Turns, norm: HeadNorm | None) -> Tensor:
        """All heads ready for attention, float32: an operation less is worth more than values left out."""
        if norm is not None:
            qkv[:, : -self.kv_heads] = rms_norm(qkv[:, : -self.kv_heads], norm.weight, norm.eps)
        return rotate(qkv, *turns.by_head)

    def _attend(self, layer: int, qkv: Tensor, window: int | None) -> Tensor:
        step = self._step
        assert step is not None, "attend before begin"
        heads = qkv.shape[1] - 2 * self.kv_heads
        self.store(layer, step.write, qkv[: step.tokens, heads:])
        if window not in step.seen:
            step.seen[window] = self._see(step, heads, window)
        seen, rows = step.seen[window], qkv.view(-1, self.width)
        if not step.prompts:
            assert self._decoding is not None
            return self._decoding.attend(layer, rows, seen.bias)
        out = qkv.new_zeros(len(qkv), heads, self.width)
        if step.decode:
            assert self._decoding is not None
            found = self._decoding.attend(layer, rows, seen.bias)
            out[step.decode] = found[: len(step.decode)]
        for together, asked in seen.prompts:
            held = self._held(layer, together.pages)
            for pieces, places in zip(together.pieces, asked, strict=True):
                queries = rows.index_select(0, places)
                out.index_copy_(0, pieces.target, self._prompt(queries, pieces, held, heads // self.kv_heads))
            del held  # before the next one's is made
        return out

    def _prompt(self, queries: Tensor, pieces: Pieces, held: Tensor, group: int) -> Tensor:
        """queries [pieces · kv_heads · rows of a product, width], held [2, pieces · kv_heads, pages,
        block_size, width] → [the pieces' own tokens, heads, width]."""
        count, heads, depth = pieces.count, self.kv_heads, pieces.depth
        queries = queries.view(held.shape[1], -1, self.width)
        keys, values = held[:, :, pieces.lowest : pieces.lowest + depth].unbind(0)
        scores = torch.bmm(queries, keys.flatten(1, 2).transpose(1, 2))
        seen = scores[:, : count * group, pieces.first :].unflatten(1, (count, group))
        seen.unflatten(0, (-1, heads)).add_(pieces.hidden)
        torch.softmax(scores, -1, out=scores)
        shares = scores.unflatten(2, (depth, -1)).transpose(1, 2)
        total = _summed(shares, values, pieces.lead)[:, : count * group]
        by_token = total.unflatten(1, (count, group)).unflatten(0, (-1, heads))
        own: Tensor = by_token.transpose(1, 2).flatten(0, 1).flatten(1, 2).index_select(0, pieces.own)
        return own

    def _held(self, layer: int, pages: Tensor) -> Tensor:
        """pages [n, depth] of a layer, float32 [2, n · kv_heads, depth, block_size, width]."""
        lying = self.pages[layer].index_select(1, pages.flatten()).unflatten(1, pages.shape).transpose(2, 3)
        return torch.empty(lying.shape).copy_(lying).flatten(1, 2)

    def _see(self, step: _Step, heads: int, window: int | None) -> _Seen:
        bias = self._decode(step, heads).bias(torch.tensor(step.lengths), window) if step.decode else []
        prompts = Prompts.cut(step.prompts, self.block_size, heads, window)
        asked = [[self._asked(each, heads // self.kv_heads) for each in some.pieces] for some in prompts]
        return _Seen(bias, list(zip(prompts, asked, strict=True)))

    def _decode(self, step: _Step, heads: int) -> Decoding:
        """The decoding of these rows; that of the step before when nothing changed."""
        wanted = (step.tables, step.decode, step.padding, heads)
        if self._decoding is None or self._decoding_of != wanted:
            readers, tokens = Readers.of(step.tables), torch.tensor(step.decode)
            self._decoding, self._decoding_of = Decoding(self, readers, tokens, step.padding, heads), wanted
        return self._decoding

    def _asked(self, pieces: Pieces, group: int) -> Tensor:
        """Where the queries of some pieces stand, [pieces · kv_heads · rows of a product] rows of qkv.

        A product has as many rows as it needs for its bits to be always the same; the last is repeated.
        """
        tokens, count = pieces.tokens.view(-1, pieces.count), pieces.count * group
        query = torch.arange(self.product_rows(count, ALONE)).clamp(max=count - 1)
        head = torch.arange(self.kv_heads)[:, None] * group + query % group
        all_heads = self.kv_heads * (group + 2)
        return (tokens[:, None, query // group] * all_heads + head).flatten()

    def _write(self, batch: Batch) -> Tensor:
        pages, heads = self.pages.shape[2], self.kv_heads
        side = torch.arange(2).view(1, 2, 1) * pages
        head = torch.arange(heads).view(1, 1, heads)
        row = (side + batch.pages.view(-1, 1, 1)) * heads + head
        return (row * self.block_size + batch.offsets.view(-1, 1, 1)).flatten()


def _summed(shares: Tensor, values: Tensor, lead: int) -> Tensor:
    """Σ over pages of shares · values, after `lead` pages of zeros, [matrices, rows, width].

    shares [matrices, pages, rows, block_size]; values [matrices, pages, block_size, width]. Pages are counted
    through, or matrices if they are fewer, so that each product is of many.
    """
    along = 0 if shares.shape[1] < len(shares) else 1
    if along == 0:
        shares, values = shares.transpose(0, 1), values.transpose(0, 1)
    shape = [*shares.shape[:3], values.shape[3]]
    shape[along] += lead
    found = values.new_empty(shape)
    zeros, own = found.split([lead, shape[along] - lead], along)
    zeros.zero_()
    for share, value, out in zip(shares, values, own, strict=True):
        torch.bmm(share, value, out=out)
    return pairwise_sum(found.transpose(0, along))
