"""A paged KV cache that the kernels write and read."""

from __future__ import annotations

import torch
from torch import Tensor

from ..device_cache import DeviceKV, Layout
from .attention import paged_attention
from .store import store


class TritonKV(DeviceKV):
    """As `DeviceKV`, by Triton's kernels; the host waits for nothing."""

    def _attend(self, layout: Layout, pages: Tensor, qkv: Tensor, window: int | None) -> Tensor:
        queries = store(qkv.contiguous(), pages, layout.pages, layout.offsets)
        found = torch.zeros_like(queries)
        for tiles in layout.tiles:
            paged_attention(queries, pages, layout.tables, tiles, window, found)
        return found
