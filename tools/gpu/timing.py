"""Time on a device: of a call after its caches were emptied; and the two rates that calls are held by."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..bench.figures import percentile

FLUSH = 256 << 20
"""Bytes written between two calls: several times the cache of any GPU."""
TRIES, WARMUP = 40, 3
"""Calls that are timed, and those before them."""
COPIED, SQUARE = 1 << 30, 8192


@dataclass(frozen=True)
class Spread:
    """Microseconds: a fifth of the calls took less than p20, a fifth more than p80."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def of(cls, seconds: list[float]) -> Spread:
        return cls(*(1e6 * percentile(seconds, percent) for percent in (20, 50, 80)))


@dataclass(frozen=True)
class Rates:
    """bandwidth: bytes a second that a large copy reads and writes. products: operations a second of a large
    bfloat16 product by the vendor's library."""

    bandwidth: float
    products: float


class Clock:
    """Times calls on one device. On a CPU the host's clock stands in, to try the program itself out."""

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

    def rates(self) -> Rates:
        """Measured here and now."""
        size, side = (COPIED, SQUARE) if self._gpu else (1 << 20, 64)
        source = torch.ones(size, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        copying = self._best(lambda: target.copy_(source))
        left, right = (torch.randn(side, side, device=self.device).bfloat16() for _ in range(2))
        multiplying = self._best(lambda: left @ right)
        return Rates(2 * size / copying, 2 * side**3 / multiplying)

    def _best(self, call: Callable[[], Any]) -> float:
        return percentile(self.seconds(call), 50)

    def _on_host(self, call: Callable[[], Any]) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
