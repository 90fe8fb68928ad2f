"""One group's part of a steering step, as plain numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ..kernels.steer import Choice
    from .group import Group


@dataclass(frozen=True)
class Pick:
    """The token chosen for a group and how; see `Trace` for what the numbers are.

    weights and rewards have one entry an objective, branch_logprobs one a branch that ran. top: the likeliest
    tokens and their log-probabilities, where asked for.
    """

    token: int
    failed: bool
    logprob: float
    weights: list[float]
    rewards: list[float]
    strength: float
    kl: float | None
    branch_logprobs: list[float]
    top: list[tuple[int, float]]


def split(choice: Choice, groups: Sequence[Group]) -> Iterator[Pick]:
    """The pick of each group, in the order in which they were steered."""
    tokens, failed, logprobs = choice.tokens.tolist(), choice.failed.tolist(), choice.logprob.tolist()
    weights, rewards = choice.weights.tolist(), choice.rewards.tolist()
    strength, kl, branches = choice.strength.tolist(), choice.kl.tolist(), choice.branch_logprobs.tolist()
    top_values, top_ids = (part.tolist() for part in choice.top) if choice.top else ([], [])
    first = 0
    for index, group in enumerate(groups):
        objectives, rows = len(group.prompts) - 1, len(group.branches)
        yield Pick(
            token=tokens[index],
            failed=failed[index],
            logprob=logprobs[index],
            weights=weights[index][:objectives],
            rewards=rewards[index][:objectives],
            strength=strength[index],
            kl=None if math.isnan(kl[index]) else kl[index],
            branch_logprobs=branches[first : first + rows],
            top=list(zip(top_ids[index], top_values[index], strict=True)) if top_ids else [],
        )
        first += rows
