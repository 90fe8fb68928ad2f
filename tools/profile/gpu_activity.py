"""GPU time by stage, launches and idle time of steps, from the events of torch's profiler."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

RANGE_PREFIX = "trimtab "
"""Prefix of the names of the ranges that mark stages."""
STEP_RANGE = "step"
"""The range around all stages."""


@dataclass(frozen=True)
class GPUActivity:
    """Means per step. launches: kernels and copies. busy_us: time in which at least one ran. gap_us: idle
    time between the first and the last."""

    launches: float
    busy_us: float
    gap_us: float


def time_by_stage(events: Iterable[Any], steps: int) -> dict[str, float]:
    """Mean GPU microseconds per step by stage: the innermost range on the GPU that contains a kernel's start.

    The profiler records each range on the host and on the GPU, there from the first to the last kernel
    launched within it. Its correlation of kernels with torch operations does not cover Triton kernels.
    """
    times: defaultdict[str, float] = defaultdict(float)
    gpu_events = [event for event in events if event.device_type.name == "CUDA"]
    ranges = [(event.time_range, event.name[len(RANGE_PREFIX) :]) for event in gpu_events if _is_range(event)]
    for start, end in gpu_spans(gpu_events):
        enclosing = [
            (time.end - time.start, name) for time, name in ranges if time.start <= start <= time.end
        ]
        times[min(enclosing)[1] if enclosing else STEP_RANGE] += (end - start) / steps
    return dict(times)


def measure_activity(spans: Sequence[tuple[float, float]], steps: int) -> GPUActivity:
    """Activity from the (start, end) of all GPU work, in microseconds, of `steps` equal steps."""
    ordered = sorted(spans)
    if not ordered:
        return GPUActivity(0, 0, 0)
    busy_time, last_end = 0.0, ordered[0][0]
    for start, end in ordered:
        busy_time += max(0.0, end - max(start, last_end))
        last_end = max(last_end, end)
    return GPUActivity(
        len(ordered) / steps, busy_time / steps, (last_end - ordered[0][0] - busy_time) / steps
    )


def gpu_spans(events: Iterable[Any]) -> list[tuple[float, float]]:
    """(start, end) of each GPU event that is not a range."""
    return [
        (event.time_range.start, event.time_range.end)
        for event in events
        if event.device_type.name == "CUDA" and not _is_range(event)
    ]


def _is_range(event: Any) -> bool:
    return bool(event.name.startswith(RANGE_PREFIX))
