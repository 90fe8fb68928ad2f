"""Times of a decoding step's stages, from the ranges that the engine gives torch's profiler.

The time of a nested stage counts only for that stage, so that stages add up to the step. Time outside all
stages (preparation of ids, copies, Python between stages) is "rest".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..bench import common

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from ...engine.engine import Engine
    from ...engine.request import Request

OTHER = "rest"
STEP_RANGE = "step"
"""The range around all stages."""
STAGES = (
    "plan", "layout", "embed", "norm", "qkv", "rope", "cache", "attention", "output", "mlp", "head", "steer",
    "append", "text", OTHER,
)  # fmt: skip
"""In execution order. cache: the KV cache write, if it is not fused with rope. steer: includes the LM head if
one kernel does both. text: the detokenizer and the rest of the output state."""


def run_steps(engine: Engine, requests: Sequence[Request]) -> Iterator[bool]:
    """Decode requests in one batch; after each step, yield whether it was a decoding step of all of them.

    Raises RunError if a request ends before its max_tokens.
    """
    core = engine._core
    groups = [group for request in requests for group in core.create_groups(request)]
    for group in groups:
        core.scheduler.add(group)
    try:
        while not all(group.is_finished for group in groups):
            lengths = [len(group.output_ids) for group in groups]
            engine._step()
            yield all(n and len(group.output_ids) == n + 1 for n, group in zip(lengths, groups, strict=True))
        outputs = [delta.output for group in groups for delta in group.pending_deltas if delta.output]
        common.check_output_lengths(outputs, requests[0].sampling.max_tokens)
    finally:
        for group in groups:
            core.scheduler.remove(group)


def stage_times(ranges: Iterable[tuple[float, float, str]]) -> list[dict[str, float]]:
    """Time by stage of each step, from the (start, end, name) of one thread's ranges."""
    steps: list[dict[str, float]] = []
    open_ranges: list[tuple[float, str]] = []  # (end, stage)
    for start, end, name in sorted(ranges, key=lambda each: (each[0], -each[1])):
        while open_ranges and open_ranges[-1][0] <= start:
            open_ranges.pop()
        if name == STEP_RANGE:
            steps.append(dict.fromkeys(STAGES, 0.0))
        elif not open_ranges:
            continue  # outside all steps
        else:
            steps[-1][open_ranges[-1][1]] -= end - start
        open_ranges.append((end, OTHER if name == STEP_RANGE else name))
        steps[-1][open_ranges[-1][1]] += end - start
    return steps
