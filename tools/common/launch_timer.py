"""How long kernels take by how they are launched, at the shapes of Llama 3.1 8B."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from triton.runtime.errors import OutOfResources

from ...kernels.lm_head import product
from ...kernels.specs.layers import ATTENTION
from ...kernels.specs.lm_head import AMULET, GREEDY, LLAMA, deciding
from ...kernels.triton.attention import paged_attention
from ...kernels.triton.lm_head.launch import lm_head_steer
from ...kernels.triton.steering.step import steer
from .statistics import percentile
from .timing import Clock

if TYPE_CHECKING:
    from collections.abc import Callable

    from ...kernels.triton.configs import Attention, Tuning

DECODING, PROMPTS = ATTENTION.cases[:2]


class DeviceClock:
    """See `tools.commands.tune.Clock`: medians of captured calls, each from memory that no cache holds."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._clock = device, Clock(device)
        self._attention = [self._made(case) for case in (DECODING, PROMPTS)]
        self._heads: dict[int, tuple[Any, ...]] = {}

    def attention(self, tuned: Attention) -> float:
        """Of branches that decode and of prompts, together."""
        return sum(self._seconds(partial(_attend, made, tuned)) for made in self._attention)

    def fused(self, rows: int, tuned: Tuning) -> float:
        """Of the vocabulary's product with the steering step, for so many requests of one row each."""
        *args, trace = self._head(rows)
        return self._seconds(lambda: lm_head_steer(*args, trace=trace, tuning=tuned))

    def apart(self, rows: int) -> float:
        """Of one after the other."""
        hidden, weight, groups, table, edits, trace = self._head(rows)
        return self._seconds(lambda: steer(product(hidden, weight), groups, table, edits, trace=trace))

    def _head(self, rows: int) -> tuple[Any, ...]:
        if rows not in self._heads:
            self._heads = {rows: self._made(deciding(LLAMA, rows, 1, AMULET, GREEDY))}  # a GiB each
        return self._heads[rows]

    def _made(self, case: Any) -> tuple[Any, ...]:
        made: tuple[Any, ...] = case.make(self._device, torch.Generator().manual_seed(0))
        return made

    def _seconds(self, call: Callable[[], Any]) -> float:
        try:
            return percentile(self._clock.seconds(self._clock.captured(call)), 50)
        except OutOfResources:
            return math.inf


def _attend(made: tuple[Any, ...], tuned: Attention) -> torch.Tensor:
    queries, cache, tables, tiles, window = made
    return paged_attention(queries, cache, tables, tiles, window, tuned=tuned)
