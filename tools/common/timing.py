"""Time of a call on a device: on a GPU, after its cache was emptied."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .statistics import percentile

FLUSH = 256 << 20
"""Bytes written between two calls: several times the cache of any GPU."""
TRIES, WARMUP = 40, 3
"""Calls that are timed, and those before them."""


@dataclass(frozen=True)
class Spread:
    """Microseconds: a fifth of the calls took less than p20, a fifth more than p80."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, seconds: list[float]) -> Spread:
        return cls(*(1e6 * percentile(seconds, percent) for percent in (20, 50, 80)))


class Clock:
    """Times calls on a device: a GPU's by its events, a CPU's by the host's clock, its caches as they are."""

    def __init__(self, device: torch.device, tries: int = TRIES) -> None:
        self.device, self.tries, self._gpu = device, tries, device.type == "cuda"
        self._flush = torch.empty(FLUSH if self._gpu else 1, dtype=torch.uint8, device=device)

    def seconds(self, call: Callable[[], Any]) -> list[float]:
        """Of each of some calls, from the first launch to the end of the last; the host's part shows where
        it is slower than the device."""
        for _ in range(min(WARMUP, self.tries)):
            call()
        if not self._gpu:
            return [self._on_host(call) for _ in range(self.tries)]
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(self.tries)]
        with torch.cuda.device(self.device):  # whose stream the events are in
            for start, end in events:
                self._flush.zero_()
                start.record()
                call()
                end.record()
        torch.cuda.synchronize(self.device)
        return [start.elapsed_time(end) / 1e3 for start, end in events]

    def captured(self, call: Callable[[], Any]) -> Callable[[], Any]:
        """The call as a CUDA graph: what is timed then is the device's part alone."""
        if not self._gpu:
            return call
        side, graph = torch.cuda.Stream(self.device), torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self.device)
        with torch.cuda.stream(side):
            call()
        torch.cuda.synchronize(self.device)
        with torch.cuda.graph(graph):
            call()
        return graph.replay

    def _on_host(self, call: Callable[[], Any]) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
