"""Counters of an engine."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stats:
    """Current gauges, and counters since the engine was made.

    running, waiting:           answers being decoded and waiting now.
    pages, pages_held:          blocks of the KV cache, and those used by running answers now.
    preemptions:                number of preempted answers.
    prompt_tokens, cached:      prompt tokens of all branches that started, and those cached.
    steps, step_seconds, steer_seconds: number of steps, their time, and the part of it spent in the LM head,
                                steering and sampling.
    captured:                   number of batch shapes captured as CUDA graphs.
    late_compiles:              kernels compiled, or loaded from the disk cache, while requests waited.
    """

    running: int
    waiting: int
    pages: int
    pages_held: int
    preemptions: int
    prompt_tokens: int
    cached: int
    steps: int
    step_seconds: float
    steer_seconds: float
    captured: int
    late_compiles: int
