"""Sentiment by VADER (Hutto and Gilbert, 2014): a lexicon and rules, no model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from ....kernels.common.errors import InputError
from .text import split_sentences, split_words

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .answer import Answer


class Vader:
    """The compound sentiment of a text, from -1 to 1: the mean over its sentences.

    VADER is designed for sentences: over an entire answer its score approaches ±1 with length, so it would
    measure length. `vader:whole` selects it.
    """

    scale: ClassVar[tuple[float, float] | None] = (-1.0, 1.0)

    def __init__(self, argument: str) -> None:
        if argument not in ("", "whole"):
            raise InputError(
                f"the scorer vader has the argument {argument!r}; it must be vader or vader:whole"
            )
        self.name = f"vader:{argument}" if argument else "vader"
        self._split: Callable[[str], list[str]] = (lambda text: [text]) if argument else split_sentences
        self._analyzer: Any = SentimentIntensityAnalyzer()

    def score(self, answers: Sequence[Answer]) -> list[float | None]:
        """The sentiment of each answer; None for one without words."""
        return [self._compound_score(answer.text) for answer in answers]

    def _compound_score(self, text: str) -> float | None:
        segments = [s for s in self._split(text) if split_words(s)]
        if not segments:
            return None
        return sum(float(self._analyzer.polarity_scores(s)["compound"]) for s in segments) / len(segments)
