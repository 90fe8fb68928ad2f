"""Length of an answer in words, characters, sentences or tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from ....kernels.common.errors import InputError
from .text import split_sentences, split_words

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .answer import Answer

UNITS = ("words", "characters", "sentences", "tokens")


class Length:
    """The number of words, or of another unit."""

    scale: ClassVar[tuple[float, float] | None] = None

    def __init__(self, argument: str) -> None:
        self._unit = argument or UNITS[0]
        if self._unit not in UNITS:
            raise InputError(f"unknown unit {argument!r} of the scorer length; units are {', '.join(UNITS)}")
        self.name = f"length:{argument}" if argument else "length"

    def score(self, answers: Sequence[Answer]) -> list[float | None]:
        """The length of each answer; None for one without words: an empty answer is not a brief one."""
        return [self._measure(answer) if split_words(answer.text) else None for answer in answers]

    def _measure(self, answer: Answer) -> float:
        if self._unit == "tokens":
            return float(answer.tokens)
        if self._unit == "characters":
            return float(len(answer.text.strip()))
        return float(len((split_words if self._unit == "words" else split_sentences)(answer.text)))
