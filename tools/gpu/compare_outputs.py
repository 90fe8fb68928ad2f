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

MOST = 20
"""Likeliest tokens that are told of."""
MEAN = 5


def compared(found: Sequence[Output], exact: Sequence[Output], near: float) -> dict[str, Any]:
    """How many answers are the same, how far log-probabilities are off, and what is "wrong", if anything.

    near: nats that a log-probability of a branch may be off, and in the mean a `MEAN`th of it. Answers
    need a trace, and `MOST` log-probabilities.
    """
    same, apart, wrong = 0, [0.0], ""
    for index, (one, other) in enumerate(zip(found, exact, strict=True)):
        if one.error or other.error:
            return {"wrong": f"answer {index} failed: {one.error or other.error}"}
        parted = parting(one, other)
        same += parted == len(one.token_ids)
        apart += [_off(one, other, at) for at in range(parted)]
        if parted < len(one.token_ids) and not _near_tie(one, other, parted, near):
            wrong = wrong or f"answer {index} parts at token {parted}, where scores were not near"
    worst, mean = max(apart), sum(apart) / len(apart)
    if not worst <= near:
        wrong = f"a log-probability is {worst:.3g} off; {near:g} is allowed"
    elif not mean <= near / MEAN:
        wrong = f"log-probabilities are {mean:.3g} off in the mean; {near / MEAN:g} is allowed"
    return {"same": f"{same} of {len(found)}", "worst": worst, "mean": mean, "wrong": wrong}


def told_nothing(found: Sequence[Output], told: Sequence[Output], near: float) -> dict[str, Any]:
    """How many greedy answers without a trace and log-probabilities are those that `told` has with them, and
    what is "wrong", if anything: where two part, both tokens must have been nearly as likely."""
    same, wrong = 0, ""
    for index, (one, other) in enumerate(zip(found, told, strict=True)):
        if one.error or other.error:
            return {"wrong": f"answer {index} failed: {one.error or other.error}"}
        parted = parting(one, other)
        same += parted == len(one.token_ids)
        if parted < len(one.token_ids) and not _nearly_chosen(one.token_ids[parted], other, parted, near):
            wrong = wrong or f"answer {index} parts at token {parted}, with one that is not nearly as likely"
    return {"same": f"{same} of {len(found)}", "wrong": wrong}


def parting(one: Output, other: Output) -> int:
    """The first place at which they have different tokens; their length where there is none."""
    pairs = enumerate(zip(one.token_ids, other.token_ids, strict=False))
    return next((at for at, (ours, theirs) in pairs if ours != theirs), len(one.token_ids))


def _off(one: Output, other: Output, at: int) -> float:
    """How far the branches' log-probabilities of a token are apart; infinite where one is no number."""
    assert one.trace is not None
    assert other.trace is not None
    rows = zip(one.trace.branch_logprobs[at], other.trace.branch_logprobs[at], strict=True)
    return max(math.inf if math.isnan(a - b) else abs(a - b) for a, b in rows)


def _near_tie(one: Output, other: Output, at: int, near: float) -> bool:
    """Whether the likeliest tokens were nearly as likely to both; steering by a multiplies errors by 2a."""
    assert one.logprobs is not None
    assert other.logprobs is not None
    allowed = _allowed(one, at, near)
    ours, theirs = one.logprobs[at].top, other.logprobs[at].top
    both = ours.keys() & theirs.keys()
    return len(both) >= len(ours) // 2 and all(abs(ours[token] - theirs[token]) <= allowed for token in both)


def _nearly_chosen(token: int, told: Output, at: int, near: float) -> bool:
    """Whether a token was nearly as likely as the one that was chosen; both scores may be off."""
    assert told.logprobs is not None
    top = told.logprobs[at].top
    return token in top and max(top.values()) - top[token] <= 2 * _allowed(told, at, near)


def _allowed(told: Output, at: int, near: float) -> float:
    """What the log-probability of a token may be off; rewards add up what was off before."""
    assert told.trace is not None
    summed = 1 + at / 8 if any(told.trace.rewards[at]) else 1
    return near * (1 + 2 * abs(told.trace.strength[at])) * summed
