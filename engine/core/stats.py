"""What an engine is doing, in numbers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stats:
    """Counts since the engine was made, but for those of this moment.

    running, waiting:           answers of this moment that are being decoded, and that wait for room.
    pages, pages_held:          of the KV cache, and how many of them hold a running answer.
    preemptions:                how often an answer gave its pages back and started again.
    prompt_tokens, cached:      of all branches that began, and how many of these were in the prefix cache.
    steps, step_seconds, steer_seconds: steps, the time they took, and how much of it choosing tokens took, by
                                the vocabulary's product, steering and sampling.
    captured:                   sizes of a decoding step that a GPU has captured and replays.
    late_compiles:              kernels that were compiled, or read from the disk, while requests waited.
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
