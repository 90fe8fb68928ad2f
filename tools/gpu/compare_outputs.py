"""Whether two engines gave the same answers, as far as rounding allows.

Answers are compared token by token as long as they agree; up to there both saw the same text, so that their
numbers must be near each other. Where they part, both must have seen nearly the same scores: a difference of
rounding chooses between near ties, and of a wrong kernel everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ...engine.outputs import Output

NUM_LOGPROBS = 20
"""Likeliest tokens that are told of."""
MEAN_DIVISOR = 5


def compare_outputs(
    outputs: Sequence[Output], references: Sequence[Output], tolerance: float
) -> dict[str, Any]:
    """How many answers are the same, how far log-probabilities are off, and what is "wrong", if anything.

    tolerance: nats that a log-probability of a branch may be off, and in the mean a `MEAN`th of it. Answers
    need a trace, and `MOST` log-probabilities.
    """
    num_same, errors, wrong = 0, [0.0], ""
    for index, (actual, expected) in enumerate(zip(outputs, references, strict=True)):
        if actual.error or expected.error:
            return {"wrong": f"answer {index} failed: {actual.error or expected.error}"}
        diff_pos = first_difference(actual, expected)
        num_same += diff_pos == len(actual.token_ids)
        errors += [_logprob_error(actual, expected, pos) for pos in range(diff_pos)]
        if diff_pos < len(actual.token_ids) and not _is_near_tie(actual, expected, diff_pos, tolerance):
            wrong = wrong or f"answer {index} parts at token {diff_pos}, where scores were not near"
    worst, mean = max(errors), sum(errors) / len(errors)
    if not worst <= tolerance:
        wrong = f"a log-probability is {worst:.3g} off; {tolerance:g} is allowed"
    elif not mean <= tolerance / MEAN_DIVISOR:
        wrong = f"log-probabilities are {mean:.3g} off in the mean; {tolerance / MEAN_DIVISOR:g} is allowed"
    return {"same": f"{num_same} of {len(outputs)}", "worst": worst, "mean": mean, "wrong": wrong}


def compare_untraced(
    outputs: Sequence[Output], references: Sequence[Output], tolerance: float
) -> dict[str, Any]:
    """How many greedy answers without a trace and log-probabilities are those that `references` has with
    them, and what is "wrong", if anything: where two part, both tokens must have been nearly as likely."""
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
                wrong or f"answer {index} parts at token {diff_pos}, with one that is not nearly as likely"
            )
    return {"same": f"{num_same} of {len(outputs)}", "wrong": wrong}


def first_difference(actual: Output, expected: Output) -> int:
    """The first place at which they have different tokens; their length where there is none."""
    pairs = enumerate(zip(actual.token_ids, expected.token_ids, strict=False))
    return next((pos for pos, (ours, theirs) in pairs if ours != theirs), len(actual.token_ids))


def _logprob_error(actual: Output, expected: Output, pos: int) -> float:
    """How far the branches' log-probabilities of a token are apart; infinite where one is no number."""
    assert actual.trace is not None
    assert expected.trace is not None
    rows = zip(actual.trace.branch_logprobs[pos], expected.trace.branch_logprobs[pos], strict=True)
    return max(math.inf if math.isnan(a - b) else abs(a - b) for a, b in rows)


def _is_near_tie(actual: Output, expected: Output, pos: int, tolerance: float) -> bool:
    """Whether the likeliest tokens were nearly as likely to both; steering by a multiplies errors by 2a."""
    assert actual.logprobs is not None
    assert expected.logprobs is not None
    allowed = _logprob_tolerance(actual, pos, tolerance)
    ours, theirs = actual.logprobs[pos].top, expected.logprobs[pos].top
    common = ours.keys() & theirs.keys()
    return len(common) >= len(ours) // 2 and all(
        abs(ours[token] - theirs[token]) <= allowed for token in common
    )


def _is_near_best(token: int, expected: Output, pos: int, tolerance: float) -> bool:
    """Whether a token was nearly as likely as the one that was chosen; both scores may be off."""
    assert expected.logprobs is not None
    top = expected.logprobs[pos].top
    return token in top and max(top.values()) - top[token] <= 2 * _logprob_tolerance(expected, pos, tolerance)


def _logprob_tolerance(output: Output, pos: int, tolerance: float) -> float:
    """What the log-probability of a token may be off; rewards add up what was off before."""
    assert output.trace is not None
    growth = 1 + pos / 8 if any(output.trace.rewards[pos]) else 1
    return tolerance * (1 + 2 * abs(output.trace.strength[pos])) * growth
