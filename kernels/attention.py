"""Attention over a paged KV cache, and the cache.

Keys and values live in pages of `block_size` tokens; a branch's page table says which pages are its own, and
branches with a common prompt share pages. Gathering pages at every step would copy the whole context for one
new token, so running branches are mirrored in tiles of 128 tokens, contiguous over branches, and a step
writes one token to both.

Decoding works on all tiles j of all branches at once: softmax within each tile, then over the tiles,

    o = Σ_j a_j o_j,    o_j = softmax(s_j) v_j,    a = softmax over j of logsumexp(s_j),

so a branch's result does not depend on how long its neighbours are: a tile beyond its end has weight 0.
The cache is float32 on a CPU, whatever the weights' type.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

TILE = 128
HIDDEN = -1e30
"""The score of a key that may not be seen; finite, so that a tile with no visible key makes no NaN."""


@dataclass(frozen=True)
class Segment:
    """One branch's share of a step: `count` new tokens after the `start` that its pages already hold.

    slot: the branch's place among the running ones. pages: its page table. fresh: this is its first step in
    this slot, so what its pages hold (a prefix shared with another branch) must be brought into the mirror.
    """

    slot: int
    start: int
    count: int
    pages: list[int]
    fresh: bool = False


@dataclass(frozen=True)
class Batch:
    """The ragged layout of one step, tokens of one segment after another.

    positions, slots [tokens]; pages, offsets [tokens]: where in the pool each token's K and V go.
    """

    segments: list[Segment]
    positions: Tensor
    pages: Tensor
    offsets: Tensor
    slots: Tensor

    @classmethod
    def of(cls, segments: list[Segment], block_size: int) -> Batch:
        """The layout of these segments, in their order."""
        positions = [segment.start + i for segment in segments for i in range(segment.count)]
        pages = [s.pages[(s.start + i) // block_size] for s in segments for i in range(s.count)]
        slots = [segment.slot for segment in segments for _ in range(segment.count)]
        where = torch.tensor([positions, pages, [p % block_size for p in positions], slots])
        return cls(segments, *where.unbind(0))


@dataclass
class _Step:
    """What the layers of one step share: where tokens go, who decodes, what they may see."""

    pool_at: Tensor  # [tokens]: rows of a layer's pool
    mirror_at: Tensor  # [tokens · 2 · kv_heads]: rows of a layer's mirror
    used: int  # tiles that the longest decoding branch reaches
    bias: Tensor  # [used · slots · kv_heads, 1, TILE]: 0 where a key is visible, else HIDDEN
    decode: Tensor  # indices of the tokens that decode
    decode_slots: Tensor
    aligned: bool  # the decoding tokens are all tokens, and stand in the order of the slots
    prefill: list[tuple[int, Segment]]  # (first token, segment)


class PagedKV:
    """The KV cache of one engine on a CPU.

    pool: [layers, pages, block_size, 2, kv_heads, head_dim], keys then values; memory that is never used is
    never touched. Call `begin` once a step, then `attend` once a layer.
    """

    def __init__(self, layers: int, pages: int, block_size: int, kv_heads: int, head_dim: int) -> None:
        self.block_size, self.kv_heads, self.head_dim = block_size, kv_heads, head_dim
        self.pool = torch.empty(layers, pages, block_size, 2, kv_heads, head_dim)
        # one a layer, [2, tiles, slots, kv_heads, TILE, head_dim]
        self._mirrors = [self.pool.new_zeros(2, 0, 0, kv_heads, TILE, head_dim) for _ in range(layers)]
        self._step: _Step | None = None

    def begin(self, batch: Batch) -> None:
        """Prepares a step: grows the mirror to hold its branches, and builds what the layers share."""
        slots = 1 + max(segment.slot for segment in batch.segments)
        tiles = -(-max(segment.start + segment.count for segment in batch.segments) // TILE)
        self._grow(tiles, slots)
        decode, lengths, prefill, first = list[int](), [0] * self._mirrors[0].shape[2], [], 0
        for segment in batch.segments:
            if segment.count == 1 and segment.start and not segment.fresh:
                decode.append(first)
                lengths[segment.slot] = segment.start + 1
            else:
                prefill.append((first, segment))
            first += segment.count
        used = -(-max(lengths) // TILE)
        decode_slots = batch.slots[decode]
        self._step = _Step(
            pool_at=batch.pages * self.block_size + batch.offsets,
            mirror_at=self._mirror_at(batch),
            used=used,
            bias=self._bias(torch.tensor(lengths), used),
            decode=torch.tensor(decode, dtype=torch.int64),
            decode_slots=decode_slots,
            aligned=not prefill and decode_slots.tolist() == list(range(len(lengths))),
            prefill=prefill,
        )

    def attend(self, layer: int, q: Tensor, kv: Tensor) -> Tensor:
        """Stores kv and returns softmax(q kᵀ / √head_dim) v over each branch's context, causally.

        q [tokens, heads, head_dim], kv [tokens, 2 · kv_heads, head_dim], keys first, both float32
        → [tokens, heads · head_dim].
        """
        step, mirror = self._step, self._mirrors[layer]
        assert step is not None, "attend before begin"
        pool = self.pool[layer].view(-1, 2 * self.kv_heads, self.head_dim)
        pool.index_copy_(0, step.pool_at, kv)
        for _, segment in step.prefill:
            if segment.fresh:
                self._enter(layer, segment)
        mirror.view(-1, self.head_dim).index_copy_(0, step.mirror_at, kv.reshape(-1, self.head_dim))
        if step.aligned:
            return self._decode(mirror, q, step).flatten(1)
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        if len(step.decode):
            dense = q.new_zeros(mirror.shape[2], *q.shape[1:])
            dense[step.decode_slots] = q[step.decode]
            out[step.decode] = self._decode(mirror, dense, step)[step.decode_slots]
        for first, segment in step.prefill:
            rows = slice(first, first + segment.count)
            out[rows] = self._prefill(mirror, q[rows], segment)
        return out.flatten(1)

    def _decode(self, mirror: Tensor, q: Tensor, step: _Step) -> Tensor:
        """q [slots, heads, head_dim] → the same; one new token for every slot, over `step.used` tiles."""
        slots, heads, head_dim = q.shape
        queries = q.reshape(slots * self.kv_heads, heads // self.kv_heads, head_dim)
        keys, values = (
            mirror[:, : step.used].flatten(1, 3).unbind(0)
        )  # [used · slots · kv_heads, TILE, head_dim]
        if step.used > 1:
            queries = queries.repeat(step.used, 1, 1)
        scores = torch.baddbmm(step.bias, queries, keys.transpose(1, 2), alpha=head_dim**-0.5)
        out = torch.bmm(scores.softmax(-1), values)
        if step.used > 1:
            level = scores.logsumexp(-1).view(step.used, -1, 1)
            share = (level - level.amax(0)).exp_()
            out = _sum(out.view(step.used, -1, head_dim) * share) / _sum(share)
        return out.view(slots, heads, head_dim)

    def _prefill(self, mirror: Tensor, q: Tensor, segment: Segment) -> Tensor:
        """q [count, heads, head_dim] of one branch, over its mirrored context."""
        end = segment.start + segment.count
        tiles = -(-end // TILE)
        group = q.shape[1] // self.kv_heads
        held = mirror[:, :tiles, segment.slot].transpose(1, 2).flatten(2, 3)[:, :, :end]
        keys, values = held.repeat_interleave(group, 1)[:, None].unbind(0)  # [1, heads, end, head_dim]
        visible = torch.ones(segment.count, end, dtype=torch.bool).tril(segment.start)
        out = functional.scaled_dot_product_attention(
            q.transpose(0, 1)[None], keys, values, attn_mask=visible
        )
        return out[0].transpose(0, 1)

    def _enter(self, layer: int, segment: Segment) -> None:
        """Gives the segment a clean slot that holds what its pages already do.

        Cleared, because a hidden key has weight 0, and 0 times a NaN left by an earlier branch is NaN.
        """
        slot = self._mirrors[layer][:, :, segment.slot]  # [2, tiles, kv_heads, TILE, head_dim]
        slot.zero_()
        at = torch.arange(segment.start)
        held = self.pool[layer, segment.pages[: -(-segment.start // self.block_size)]]
        slot.permute(1, 3, 0, 2, 4)[at // TILE, at % TILE] = held.flatten(0, 1)[: segment.start]

    def release(self) -> None:
        """Gives the mirror's memory back. Only between steps, when no branch is running."""
        self._mirrors = [m.new_zeros(2, 0, 0, *m.shape[3:]) for m in self._mirrors]

    def _grow(self, tiles: int, slots: int) -> None:
        have_tiles, have_slots = self._mirrors[0].shape[1:3]
        if tiles <= have_tiles and slots <= have_slots:
            return
        tiles = have_tiles if tiles <= have_tiles else max(tiles, 2 * have_tiles)
        slots = max(slots, have_slots)
        for layer, old in enumerate(self._mirrors):
            new = old.new_zeros(2, tiles, slots, *old.shape[3:])
            new[:, :have_tiles, :have_slots] = old
            self._mirrors[layer] = new

    def _mirror_at(self, batch: Batch) -> Tensor:
        """Where each token's keys and values go: rows of the mirror seen as [rows, head_dim]."""
        _, tiles, slots, heads = self._mirrors[0].shape[:4]
        side = torch.arange(2).view(1, 2, 1) * tiles * slots
        column = (batch.positions // TILE * slots + batch.slots).view(-1, 1, 1)
        head = torch.arange(heads).view(1, 1, heads)
        rows = ((side + column) * heads + head) * TILE + (batch.positions % TILE).view(-1, 1, 1)
        return rows.flatten()

    def _bias(self, lengths: Tensor, used: int) -> Tensor:
        position = torch.arange(used * TILE).view(used, 1, 1, TILE)
        bias = torch.where(position < lengths.view(1, -1, 1, 1), 0.0, HIDDEN)
        return bias.expand(-1, -1, self.kv_heads, -1).reshape(-1, 1, TILE)


def _sum(x: Tensor) -> Tensor:
    """Σ x over the first dimension, neighbour with neighbour, so that zeros at the end change no bit.

    `sum(0)` and `softmax(0)` round the columns that do not fill a vector in another way than the rest.
    """
    while len(x) > 1:
        pairs = x[:-1:2] + x[1::2]
        x = torch.cat((pairs, x[-1:])) if len(x) % 2 else pairs
    return x[0]
