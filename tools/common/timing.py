"""Time calls on a device; on a GPU, with its cache flushed before each call."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .statistics import percentile

FLUSH_BYTES = 256 << 20
"""Bytes written between two calls, to flush the cache: several times that of any GPU."""
NUM_TRIALS, NUM_WARMUP = 40, 3
"""Timed calls, and warm-up calls before them."""


@dataclass(frozen=True)
class TimeSpread:
    """20th, 50th and 80th percentile in microseconds."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def from_seconds(cls, seconds: list[float]) -> TimeSpread:
        return cls(*(1e6 * percentile(seconds, percent) for percent in (20, 50, 80)))


class Clock:
    """Times calls: on a GPU with CUDA events, on a CPU with the host's clock and without a cache flush."""

    def __init__(self, device: torch.device, tries: int = NUM_TRIALS) -> None:
        self.device, self.tries, self._is_gpu = device, tries, device.type == "cuda"
        self._flush_buffer = torch.empty(FLUSH_BYTES if self._is_gpu else 1, dtype=torch.uint8, device=device)

    def seconds(self, call: Callable[[], Any]) -> list[float]:
        """Seconds of each of `tries` calls, from its first launch to the end of its last kernel. Host time is
        included where the host is slower than the device."""
        for _ in range(min(NUM_WARMUP, self.tries)):
            call()
        if not self._is_gpu:
            return [self._time_on_host(call) for _ in range(self.tries)]
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(self.tries)]
        with torch.cuda.device(self.device):  # the events are recorded on its stream
            for start, end in events:
                self._flush_buffer.zero_()
                start.record()
                call()
                end.record()
        torch.cuda.synchronize(self.device)
        return [start.elapsed_time(end) / 1e3 for start, end in events]

    def capture(self, call: Callable[[], Any]) -> Callable[[], Any]:
        """The call as a CUDA graph, to time the device without the host."""
        if not self._is_gpu:
            return call
        stream, graph = torch.cuda.Stream(self.device), torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self.device)
        with torch.cuda.stream(stream):
            call()
        torch.cuda.synchronize(self.device)
        with torch.cuda.graph(graph):
            call()
        return graph.replay

    def _time_on_host(self, call: Callable[[], Any]) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
