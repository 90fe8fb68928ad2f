"""Formatting of an Output: a dictionary for JSON, a caption for the terminal."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ...engine.outputs import Output
    from ...engine.request import Request


def output_to_dict(output: Output, method: str) -> dict[str, Any]:
    """An output as a dictionary. Trace keys are None without a trace; `outputs` is present for n > 1."""
    result = _one_to_dict(output, method)
    if len(output.outputs) > 1:
        result["outputs"] = [_one_to_dict(each, method) for each in output.outputs]
    return result


def _one_to_dict(output: Output, method: str) -> dict[str, Any]:
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
        "fulfilment": output.fulfilment,
        "notes": output.notes,
        "strength": trace and trace.strength,
        "kl": trace and trace.kl,
        "logprobs": output.logprobs and [asdict(token) for token in output.logprobs],
        "error": output.error,
    }


def all_outputs(output: Output) -> list[Output]:
    """All n outputs of a request."""
    return output.outputs or [output]


def format_caption(output: Output, sampled: bool) -> str:
    """`42 tokens · 18.3 tok/s · stop`, and the seed if tokens were sampled."""
    speed = output.timings.tokens_per_second
    num_tokens = len(output.token_ids)
    parts = [
        f"{num_tokens} token{'s' * (num_tokens != 1)}",
        f"{speed:.1f} tok/s" if math.isfinite(speed) else "",
    ]
    parts += [output.finish_reason, f"seed {output.seed}" if sampled else ""]
    return " · ".join(part for part in parts if part)


def format_caption_and_notes(output: Output, request: Request) -> str:
    """The caption, and a line for each note that was not issued as a warning when the request was made."""
    warned = set(request.steering.iter_warnings())
    caption = format_caption(output, request.sampling.temperature > 0)
    return "\n".join([caption, *(note for note in output.notes if note not in warned)])


def format_strength(output: Output) -> str:
    """The strength of a traced output: `a = 5.65`, or its range if a trust region changes it; "" without."""
    strengths = [a for a in output.trace.strength if math.isfinite(a)] if output.trace else []
    if not strengths:
        return ""
    low, high, mean = min(strengths), max(strengths), sum(strengths) / len(strengths)
    return f"a = {mean:.2f}" if high - low < 0.005 else f"a = {low:.2f} to {high:.2f}, mean {mean:.2f}"
