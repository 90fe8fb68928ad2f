"""What a GPU did in some steps, from the events of torch's profiler: by stage, launches, gaps."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

RANGE_PREFIX = "trimtab "
"""Begins the names of our ranges."""
STEP_RANGE = "step"
"""The range around all stages."""


@dataclass(frozen=True)
class GPUActivity:
    """Of one step in the mean. launches: kernels and copies. busy_us: the GPU worked, gap_us: it waited
    between the first and the last of them."""

    launches: float
    busy_us: float
    gap_us: float


def time_by_stage(events: Iterable[Any], steps: int) -> dict[str, float]:
    """Microseconds of the GPU by the innermost of our ranges around them there, of one step in the mean.

    The profiler has each range once for the host and once for the GPU, from the first to the last of what was
    launched within. It links kernels to torch's operations only, and Triton's have none.
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
    """Of the (start, end) of everything that the GPU did, microseconds, in `steps` like steps."""
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
    """Of the events that are a GPU's and no ranges."""
    return [
        (event.time_range.start, event.time_range.end)
        for event in events
        if event.device_type.name == "CUDA" and not _is_range(event)
    ]


def _is_range(event: Any) -> bool:
    return bool(event.name.startswith(RANGE_PREFIX))
