"""The scorers' input: question, objectives and answer, without the method that decoded it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Answer:
    """One answer to be scored.

    preferences:   the texts of the objectives to score it by: one for an objective's scorer, all for others.
    weights:       the weight of each of them; they sum to 1.
    tokens:        length in tokens, a stop token included.
    base_logprob:  mean log-probability of its tokens under the model without objectives; None without tokens.
    finish_reason: "stop", "length" (cut off) or "error".
    """

    question: str
    preferences: tuple[str, ...]
    weights: tuple[float, ...]
    text: str
    tokens: int
    base_logprob: float | None
    finish_reason: str
