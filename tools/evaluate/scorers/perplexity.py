"""Perplexity of an answer under the steered model without objectives."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, ClassVar

from .text import require_no_argument

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .answer import Answer

MAX_EXPONENT = 700.0
"""exp overflows a float above about 709."""


class Perplexity:
    """exp of the mean negative log-probability of the answer's tokens under the model without objectives."""

    name = "perplexity"
    scale: ClassVar[tuple[float, float] | None] = None

    def __init__(self, argument: str) -> None:
        require_no_argument(self.name, argument)

    def score(self, answers: Sequence[Answer]) -> list[float | None]:
        """The perplexity of each answer, at least 1; None for one without tokens."""
        return [
            None if answer.base_logprob is None else math.exp(min(MAX_EXPONENT, -answer.base_logprob))
            for answer in answers
        ]
