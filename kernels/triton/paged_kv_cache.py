"""Paged KV caches that the kernels write and read."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from ..reference.paged_kv_cache import DeviceKV, Layout
from .attention import paged_attention
from .batch_invariant_attention import invariant_attention
from .rotary import rope_write

if TYPE_CHECKING:
    from torch import Tensor

    from ..reference.rotary import HeadNorm, Turns


class TritonKV(DeviceKV):
    """As `DeviceKV`, by Triton's kernels; the host waits for nothing."""

    attention = staticmethod(paged_attention)

    def turn(self, layout: Layout, pages: Tensor, qkv: Tensor, turns: Turns, norm: HeadNorm | None) -> Tensor:
        return rope_write(qkv.contiguous(), turns, norm, pages, layout.pages, layout.offsets)

    def read(self, layout: Layout, pages: Tensor, queries: Tensor, window: int | None) -> Tensor:
        found = torch.empty_like(queries)
        found[len(layout.pages) :] = 0  # rows that only fill up have no tile
        for tiles in layout.tiles:
            self.attention(queries, pages, layout.tables, tiles, window, found)
        return found


class InvariantKV(TritonKV):
    """As `TritonKV`, with bits that depend neither on a step's other tokens nor on how a prompt was cut."""

    attention = staticmethod(invariant_attention)
