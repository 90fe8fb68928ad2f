"""Compare the outputs of two engines up to rounding.

Outputs are compared token by token while they agree: both engines saw the same text, so their
log-probabilities must be close. Where they diverge, both must have seen nearly equal scores: rounding changes
the choice only between near ties, a wrong kernel anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ...engine.outputs import Output

NUM_LOGPROBS = 20
"""Top log-probabilities requested per token."""
MEAN_DIVISOR = 5


def compare_outputs(
    outputs: Sequence[Output], references: Sequence[Output], tolerance: float
) -> dict[str, Any]:
    """Count equal outputs, measure log-probability errors, and describe a failure in "wrong", else "".

    tolerance: allowed error of a branch's log-probability in nats; the mean may be 1/`MEAN_DIVISOR` of it.
    Outputs need a trace and `NUM_LOGPROBS` log-probabilities.
    """
    num_same, errors, wrong = 0, [0.0], ""
    for index, (actual, expected) in enumerate(zip(outputs, references, strict=True)):
        if actual.error or expected.error:
            return {"wrong": f"answer {index} failed: {actual.error or expected.error}"}
        diff_pos = first_difference(actual, expected)
        num_same += diff_pos == len(actual.token_ids)
        errors += [_logprob_error(actual, expected, pos) for pos in range(diff_pos)]
        if diff_pos < len(actual.token_ids) and not _is_near_tie(actual, expected, diff_pos, tolerance):
            wrong = wrong or f"answer {index} diverges at token {diff_pos}, not a near tie"
    worst, mean = max(errors), sum(errors) / len(errors)
    if not worst <= tolerance:
        wrong = f"a log-probability is off by {worst:.3g}, over {tolerance:g}"
    elif not mean <= tolerance / MEAN_DIVISOR:
        wrong = f"the mean log-probability error is {mean:.3g}, over {tolerance / MEAN_DIVISOR:g}"
    return {"same": f"{num_same} of {len(outputs)}", "worst": worst, "mean": mean, "wrong": wrong}


def compare_untraced(
    outputs: Sequence[Output], references: Sequence[Output], tolerance: float
) -> dict[str, Any]:
    """Compare greedy outputs without trace and log-probabilities with `references`, which have them.

    Where two outputs diverge, the chosen token must be nearly as likely as the reference's.
    """
    num_same, wrong = 0, ""
    for index, (actual, expected) in enumerate(zip(outputs, references, strict=True)):
        if actual.error or expected.error:
            return {"wrong": f"answer {index} failed: {actual.error or expected.error}"}
        diff_pos = first_difference(actual, expected)
        num_same += diff_pos == len(actual.token_ids)
        if diff_pos < len(actual.token_ids) and not _is_near_best(
            actual.token_ids[diff_pos], expected, diff_pos, tolerance
        ):
            wrong = (
                wrong or f"answer {index} diverges at token {diff_pos}, to a token that is much less likely"
            )
    return {"same": f"{num_same} of {len(outputs)}", "wrong": wrong}


def first_difference(actual: Output, expected: Output) -> int:
    """Index of the first differing token; the length of `actual` if there is none."""
    pairs = enumerate(zip(actual.token_ids, expected.token_ids, strict=False))
    return next((pos for pos, (ours, theirs) in pairs if ours != theirs), len(actual.token_ids))


def _logprob_error(actual: Output, expected: Output, pos: int) -> float:
    """Largest difference of the branches' log-probabilities of a token; infinite for NaN."""
    assert actual.trace is not None
    assert expected.trace is not None
    rows = zip(actual.trace.branch_logprobs[pos], expected.trace.branch_logprobs[pos], strict=True)
    return max(math.inf if math.isnan(a - b) else abs(a - b) for a, b in rows)


def _is_near_tie(actual: Output, expected: Output, pos: int, tolerance: float) -> bool:
    """Whether the top log-probabilities nearly agree; steering with strength a multiplies errors by 2a."""
    assert actual.logprobs is not None
    assert expected.logprobs is not None
    allowed = _logprob_tolerance(actual, pos, tolerance)
    ours, theirs = actual.logprobs[pos].top, expected.logprobs[pos].top
    common = ours.keys() & theirs.keys()
    return len(common) >= len(ours) // 2 and all(
        abs(ours[token] - theirs[token]) <= allowed for token in common
    )


def _is_near_best(token: int, expected: Output, pos: int, tolerance: float) -> bool:
    """Whether a token was nearly as likely as the chosen one, allowing errors in both scores."""
    assert expected.logprobs is not None
    top = expected.logprobs[pos].top
    return token in top and max(top.values()) - top[token] <= 2 * _logprob_tolerance(expected, pos, tolerance)


def _logprob_tolerance(output: Output, pos: int, tolerance: float) -> float:
    """Allowed error of a token's log-probability; accumulated rewards add up earlier errors."""
    assert output.trace is not None
    growth = 1 + pos / 8 if any(output.trace.rewards[pos]) else 1
    return tolerance * (1 + 2 * abs(output.trace.strength[pos])) * growth
