"""Time Triton kernels with a launch configuration, at the shapes of Llama 3.1 8B."""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from triton.runtime.errors import OutOfResources

from ...kernels.lm_head import logits_matmul
from ...kernels.specs.layers import ATTENTION
from ...kernels.specs.lm_head import AMULET, GREEDY, LLAMA, fused_case
from ...kernels.triton.attention import paged_attention
from ...kernels.triton.lm_head.launch import lm_head_steer
from ...kernels.triton.steering.step import steer
from .statistics import percentile
from .timing import Clock

if TYPE_CHECKING:
    from collections.abc import Callable

    from ...kernels.specs.spec import KernelCase
    from ...kernels.triton.configs import AttentionConfig, LMHeadConfig

DECODE_CASE, PREFILL_CASE = ATTENTION.cases[:2]


class DeviceClock:
    """A `tools.commands.tune.TuningClock`: median seconds of captured calls, each after a cache flush."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._clock = device, Clock(device)
        self._attention_args = [self._make_args(case) for case in (DECODE_CASE, PREFILL_CASE)]
        self._head_args_by_rows: dict[int, tuple[Any, ...]] = {}

    def attention(self, config: AttentionConfig) -> float:
        """Attention: decode and prefill together."""
        return sum(
            self._median_seconds(partial(_run_attention, args, config)) for args in self._attention_args
        )

    def fused(self, rows: int, config: LMHeadConfig) -> float:
        """The fused LM head and steering step, for `rows` requests of one row each."""
        *args, trace = self._head_args(rows)
        return self._median_seconds(lambda: lm_head_steer(*args, trace=trace, config=config))

    def apart(self, rows: int) -> float:
        """LM head and steering step as separate kernels."""
        hidden, weight, groups, table, edits, trace = self._head_args(rows)
        return self._median_seconds(
            lambda: steer(logits_matmul(hidden, weight), groups, table, edits, trace=trace)
        )

    def _head_args(self, rows: int) -> tuple[Any, ...]:
        if rows not in self._head_args_by_rows:
            self._head_args_by_rows = {
                rows: self._make_args(fused_case(LLAMA, rows, 1, AMULET, GREEDY))
            }  # a GiB each, so only one is cached
        return self._head_args_by_rows[rows]

    def _make_args(self, case: KernelCase) -> tuple[Any, ...]:
        return case.make_args(self._device, torch.Generator().manual_seed(0))

    def _median_seconds(self, call: Callable[[], Any]) -> float:
        try:
            return percentile(self._clock.seconds(self._clock.capture(call)), 50)
        except OutOfResources:
            return math.inf


def _run_attention(args: tuple[Any, ...], config: AttentionConfig) -> torch.Tensor:
    queries, cache, tables, tiles, params = args
    return paged_attention(queries, cache, tables, tiles, params, config=config)
