"""Share of words that a regular expression matches."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, ClassVar

from ....kernels.common.errors import InputError
from .text import split_words

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .answer import Answer


class Lexical:
    """Matches of a regular expression divided by the number of words; case-insensitive."""

    scale: ClassVar[tuple[float, float] | None] = None

    def __init__(self, argument: str) -> None:
        if not argument:
            raise InputError(r"the scorer lexical needs a regular expression, such as lexical:\bsea\b")
        try:
            self._pattern = re.compile(argument, re.IGNORECASE)
        except re.error as error:
            raise InputError(
                f"the scorer lexical has an invalid regular expression {argument!r} ({error})"
            ) from None
        self.name = f"lexical:{argument}"

    def score(self, answers: Sequence[Answer]) -> list[float | None]:
        """The share for each answer; None for one without words."""
        return [self._match_rate(answer.text) for answer in answers]

    def _match_rate(self, text: str) -> float | None:
        num_words = len(split_words(text))
        num_matches = sum(1 for match in self._pattern.finditer(text) if match.group())
        return num_matches / num_words if num_words else None
