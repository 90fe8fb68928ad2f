"""What a GPU did in some steps, from the events of torch's profiler: by stage, launches, gaps."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

PREFIX = "trimtab "
"""Begins the names of our ranges."""
STEP = "step"
"""The range around all stages."""


@dataclass(frozen=True)
class Busy:
    """Of one step in the mean. launches: kernels and copies. busy_us: the GPU worked, gap_us: it waited
    between the first and the last of them."""

    launches: float
    busy_us: float
    gap_us: float


def by_stage(events: Iterable[Any], steps: int) -> dict[str, float]:
    """Microseconds of the GPU by the innermost of our ranges around them there, of one step in the mean.

    The profiler has each range once for the host and once for the GPU, from the first to the last of what was
    launched within. It links kernels to torch's operations only, and Triton's have none.
    """
    found: defaultdict[str, float] = defaultdict(float)
    on_gpu = [event for event in events if event.device_type.name == "CUDA"]
    ranges = [(event.time_range, event.name[len(PREFIX) :]) for event in on_gpu if _is_range(event)]
    for start, end in spans(on_gpu):
        around = [(time.end - time.start, name) for time, name in ranges if time.start <= start <= time.end]
        found[min(around)[1] if around else STEP] += (end - start) / steps
    return dict(found)


def busy(spans: Sequence[tuple[float, float]], steps: int) -> Busy:
    """Of the (start, end) of everything that the GPU did, microseconds, in `steps` like steps."""
    ranked = sorted(spans)
    if not ranked:
        return Busy(0, 0, 0)
    working, reached = 0.0, ranked[0][0]
    for start, end in ranked:
        working += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return Busy(len(ranked) / steps, working / steps, (reached - ranked[0][0] - working) / steps)


def spans(events: Iterable[Any]) -> list[tuple[float, float]]:
    """Of the events that are a GPU's and no ranges."""
    return [
        (event.time_range.start, event.time_range.end)
        for event in events
        if event.device_type.name == "CUDA" and not _is_range(event)
    ]


def _is_range(event: Any) -> bool:
    return bool(event.name.startswith(PREFIX))
