"""Time of a call on a device: on a GPU, after its cache was emptied."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .statistics import percentile

FLUSH_BYTES = 256 << 20
"""Bytes written between two calls: several times the cache of any GPU."""
NUM_TRIALS, NUM_WARMUP = 40, 3
"""Calls that are timed, and those before them."""


@dataclass(frozen=True)
class TimeSpread:
    """Microseconds: a fifth of the calls took less than p20, a fifth more than p80."""

    p20: float
    p50: float
    p80: float

    @classmethod
    def from_seconds(cls, seconds: list[float]) -> TimeSpread:
        return cls(*(1e6 * percentile(seconds, percent) for percent in (20, 50, 80)))


class Clock:
    """Times calls on a device: a GPU's by its events, a CPU's by the host's clock, its caches as they are."""

    def __init__(self, device: torch.device, tries: int = NUM_TRIALS) -> None:
        self.device, self.tries, self._is_gpu = device, tries, device.type == "cuda"
        self._flush_buffer = torch.empty(FLUSH_BYTES if self._is_gpu else 1, dtype=torch.uint8, device=device)

    def seconds(self, call: Callable[[], Any]) -> list[float]:
        """Of each of some calls, from the first launch to the end of the last; the host's part shows where
        it is slower than the device."""
        for _ in range(min(NUM_WARMUP, self.tries)):
            call()
        if not self._is_gpu:
            return [self._time_on_host(call) for _ in range(self.tries)]
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(self.tries)]
        with torch.cuda.device(self.device):  # whose stream the events are in
            for start, end in events:
                self._flush_buffer.zero_()
                start.record()
                call()
                end.record()
        torch.cuda.synchronize(self.device)
        return [start.elapsed_time(end) / 1e3 for start, end in events]

    def capture(self, call: Callable[[], Any]) -> Callable[[], Any]:
        """The call as a CUDA graph: what is timed then is the device's part alone."""
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
