"""An Output as the command line tells it: a dictionary for JSON, a caption for people."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ...engine.outputs import Output


def describe(output: Output, method: str) -> dict[str, Any]:
    """All of an answer. What a trace would say is null without one; `outputs` is there for n > 1."""
    found = _one(output, method)
    if len(output.outputs) > 1:
        found["outputs"] = [_one(each, method) for each in output.outputs]
    return found


def _one(output: Output, method: str) -> dict[str, Any]:
    trace = output.trace
    return {
        "text": output.text,
        "token_ids": output.token_ids,
        "finish_reason": output.finish_reason,
        "method": method,
        "branches": [asdict(branch) for branch in output.branches],
        "weights": trace and trace.weights,
        "branch_logprobs": trace and trace.branch_logprobs,
        "timings": asdict(output.timings),
        "seed": output.seed,
        "rewards": trace and trace.rewards,
        "strength": trace and trace.strength,
        "kl": trace and trace.kl,
        "logprobs": output.logprobs and [asdict(token) for token in output.logprobs],
        "error": output.error,
    }


def answers(output: Output) -> list[Output]:
    """All n answers of a request."""
    return output.outputs or [output]


def caption(output: Output, sampled: bool) -> str:
    """`42 tokens · 18.3 tok/s · stop`, and the seed where tokens were drawn."""
    speed = output.timings.tokens_per_second
    count = len(output.token_ids)
    parts = [f"{count} token{'s' * (count != 1)}", f"{speed:.1f} tok/s" if math.isfinite(speed) else ""]
    parts += [output.finish_reason, f"seed {output.seed}" if sampled else ""]
    return " · ".join(part for part in parts if part)


def strength(output: Output) -> str:
    """The strength of a traced answer: `a = 5.65`, or its range where a trust region moves it."""
    found = [a for a in output.trace.strength if math.isfinite(a)] if output.trace else []
    if not found:
        return ""
    low, high, mean = min(found), max(found), sum(found) / len(found)
    return f"a = {mean:.2f}" if high - low < 0.005 else f"a = {low:.2f} to {high:.2f}, mean {mean:.2f}"
