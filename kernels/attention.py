"""Attention over a paged KV cache, and the cache.

Keys and values live in pages of `block_size` tokens; a branch's page table says which pages are its own, and
branches with a common prompt share pages. Gathering pages at every step would copy the whole context for one
new token, so running branches are mirrored in tiles of 128 tokens, contiguous over branches, and a step
writes one token to both.

Decoding works on all tiles of all branches at once, softmax taken per tile and merged,

    o = Σ_j e^{m_j − M} o_j / Σ_j e^{m_j − M} l_j,    m_j = max s_j,  l_j = Σ e^{s_j − m_j},  M = max_j m_j,

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
    """What the layers of one step share: where tokens go in the mirror, who decodes, what they may see."""

    batch: Batch
    tiles: Tensor
    tile_offsets: Tensor
    used: int  # tiles that the longest decoding branch reaches
    bias: Tensor  # [used · slots · kv_heads, 1, TILE]: 0 where a key is visible, else HIDDEN
    decode: Tensor  # indices of the tokens that decode
    decode_slots: Tensor
    aligned: bool  # the decoding tokens are all tokens, and stand in the order of the slots
    prefill: list[tuple[int, Segment]]  # (first token, segment)


class PagedKV:
    """The KV cache of one engine on a CPU.

    keys, values: [layers, pages, block_size, kv_heads, head_dim]; the memory is touched only when used.
    Call `begin` once a step, then `attend` once a layer.
    """

    def __init__(self, layers: int, pages: int, block_size: int, kv_heads: int, head_dim: int) -> None:
        self.block_size, self.kv_heads, self.head_dim = block_size, kv_heads, head_dim
        self.keys = torch.empty(layers, pages, block_size, kv_heads, head_dim)
        self.values = torch.empty_like(self.keys)
        # per layer [tiles, slots, kv_heads, TILE, head_dim]
        self._mirror_keys = [self.keys.new_zeros(0, 0, kv_heads, TILE, head_dim) for _ in range(layers)]
        self._mirror_values = [self.values.new_zeros(0, 0, kv_heads, TILE, head_dim) for _ in range(layers)]
        self._step: _Step | None = None

    def begin(self, batch: Batch) -> None:
        """Prepares a step: grows the mirror to hold its branches, and builds what the layers share."""
        slots = 1 + max(segment.slot for segment in batch.segments)
        tiles = -(-max(segment.start + segment.count for segment in batch.segments) // TILE)
        self._grow(tiles, slots)
        decode, lengths, prefill, first = [], [0] * self._mirror_keys[0].shape[1], [], 0
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
            batch=batch,
            tiles=batch.positions // TILE,
            tile_offsets=batch.positions % TILE,
            used=used,
            bias=self._bias(torch.tensor(lengths), used),
            decode=torch.tensor(decode, dtype=torch.int64),
            decode_slots=decode_slots,
            aligned=not prefill and decode_slots.tolist() == list(range(len(lengths))),
            prefill=prefill,
        )

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Stores k, v and returns softmax(q kᵀ / √head_dim) v over each branch's context, causally.

        q [tokens, heads, head_dim]; k, v [tokens, kv_heads, head_dim] → [tokens, heads · head_dim].
        """
        step = self._step
        assert step is not None, "attend before begin"
        q, k, v = q.float(), k.float(), v.float()
        batch = step.batch
        for pool, mirror, new in (
            (self.keys[layer], self._mirror_keys[layer], k),
            (self.values[layer], self._mirror_values[layer], v),
        ):
            pool[batch.pages, batch.offsets] = new
            for _, segment in step.prefill:
                if segment.fresh:
                    self._enter(segment, pool, mirror)
            mirror.transpose(2, 3)[step.tiles, batch.slots, step.tile_offsets] = new
        if step.aligned:
            return self._decode(layer, q, step).flatten(1)
        out = torch.empty_like(q)
        if len(step.decode):
            dense = q.new_zeros(self._mirror_keys[layer].shape[1], *q.shape[1:])
            dense[step.decode_slots] = q[step.decode]
            out[step.decode] = self._decode(layer, dense, step)[step.decode_slots]
        for first, segment in step.prefill:
            rows = slice(first, first + segment.count)
            out[rows] = self._prefill(layer, q[rows], segment)
        return out.flatten(1)

    def _decode(self, layer: int, q: Tensor, step: _Step) -> Tensor:
        """q [slots, heads, head_dim] → the same; one new token for every slot, over `step.used` tiles."""
        slots, heads, head_dim = q.shape
        grouped = (q * head_dim**-0.5).view(slots * self.kv_heads, heads // self.kv_heads, head_dim)
        keys = self._mirror_keys[layer][: step.used].flatten(
            0, 2
        )  # [used · slots · kv_heads, TILE, head_dim]
        values = self._mirror_values[layer][: step.used].flatten(0, 2)
        scores = torch.baddbmm(step.bias, grouped.repeat(step.used, 1, 1), keys.transpose(1, 2))
        top = scores.amax(-1, keepdim=True)
        weights = (scores - top).exp_()
        total, out = weights.sum(-1, keepdim=True), torch.bmm(weights, values)
        if step.used > 1:
            top, total, out = (x.unflatten(0, (step.used, -1)) for x in (top, total, out))
            share = (top - top.amax(0)).exp_()
            total, out = (share * total).sum(0), (share * out).sum(0)
        return (out / total).view(slots, heads, head_dim)

    def _prefill(self, layer: int, q: Tensor, segment: Segment) -> Tensor:
        """q [count, heads, head_dim] of one branch, over its mirrored context."""
        end = segment.start + segment.count
        tiles = -(-end // TILE)
        group = q.shape[1] // self.kv_heads
        context = [
            mirror[layer][:tiles, segment.slot]
            .transpose(0, 1)
            .flatten(1, 2)[:, :end]
            .repeat_interleave(group, 0)
            for mirror in (self._mirror_keys, self._mirror_values)
        ]
        visible = torch.ones(segment.count, end, dtype=torch.bool).tril(segment.start)
        out = functional.scaled_dot_product_attention(
            q.transpose(0, 1)[None], context[0][None], context[1][None], attn_mask=visible
        )
        return out[0].transpose(0, 1)

    def _enter(self, segment: Segment, pool: Tensor, mirror: Tensor) -> None:
        """Gives the segment a clean slot that holds what its pages already do.

        Cleared, because a hidden key has weight 0, and 0 times a NaN left by an earlier branch is NaN.
        """
        mirror[:, segment.slot] = 0
        at = torch.arange(segment.start)
        pages = segment.pages[: -(-segment.start // self.block_size)]
        mirror.transpose(2, 3)[at // TILE, segment.slot, at % TILE] = pool[pages].flatten(0, 1)[
            : segment.start
        ]

    def release(self) -> None:
        """Gives the mirror's memory back. Only between steps, when no branch is running."""
        for mirror in (self._mirror_keys, self._mirror_values):
            mirror[:] = [layer.new_zeros(0, 0, *layer.shape[2:]) for layer in mirror]

    def _grow(self, tiles: int, slots: int) -> None:
        have_tiles, have_slots = self._mirror_keys[0].shape[:2]
        if tiles <= have_tiles and slots <= have_slots:
            return
        tiles = max(tiles, have_tiles if tiles <= have_tiles else 2 * have_tiles)
        slots = max(slots, have_slots)
        for mirror in (self._mirror_keys, self._mirror_values):
            for layer, old in enumerate(mirror):
                new = old.new_zeros(tiles, slots, *old.shape[2:])
                new[:have_tiles, :have_slots] = old
                mirror[layer] = new

    def _bias(self, lengths: Tensor, used: int) -> Tensor:
        position = torch.arange(used * TILE).view(used, 1, 1, TILE)
        bias = torch.where(position < lengths.view(1, -1, 1, 1), 0.0, HIDDEN)
        return bias.expand(-1, -1, self.kv_heads, -1).reshape(-1, 1, TILE)
