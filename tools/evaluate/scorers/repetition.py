"""Repetition rate of an answer (rep-n)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from ....kernels.common.errors import InputError
from .text import split_words

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .answer import Answer

DEFAULT_N = 3


class Repetition:
    """The share of word n-grams (n = 3 by default) that occurred earlier in the answer, from 0 to 1.

    This is 1 − distinct/all, the rep-n of Welleck et al. (2020).
    """

    scale: ClassVar[tuple[float, float] | None] = (0.0, 1.0)

    def __init__(self, argument: str) -> None:
        if argument and not (argument.isascii() and argument.isdigit() and int(argument[:9]) > 0):
            raise InputError(
                f"the scorer repetition has the argument {argument!r}; it must be a number of words ≥ 1"
            )
        self._n = int(argument or DEFAULT_N)
        self.name = f"repetition:{argument}" if argument else "repetition"

    def score(self, answers: Sequence[Answer]) -> list[float | None]:
        """The rate of each answer, 0 for one shorter than n words; None for one without words."""
        return [self._repetition_rate(split_words(answer.text)) for answer in answers]

    def _repetition_rate(self, word_list: list[str]) -> float | None:
        if not word_list:
            return None
        ngrams = [tuple(word_list[i : i + self._n]) for i in range(len(word_list) - self._n + 1)]
        return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0
