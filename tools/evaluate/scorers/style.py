"""Words of a style: how many words of a lexicon an answer uses, each counted once."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from ....kernels.common.errors import InputError, short_repr
from .text import split_words

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .answer import Answer

LEXICON_FILE = Path(__file__).with_name("lexicons.json")
"""About thirty words for each style; ours. None is in the objectives that docs/trim.md measures with it."""


class Style:
    """The number of different words of the style's lexicon; compare answers of about equal length."""

    scale: ClassVar[tuple[float, float] | None] = None

    def __init__(self, argument: str) -> None:
        lexicons = read_lexicons()
        if argument not in lexicons:
            raise InputError(
                f"the scorer style has the argument {short_repr(argument)}; styles are {', '.join(lexicons)}"
            )
        self.name, self._lexicon = f"style:{argument}", lexicons[argument]

    def score(self, answers: Sequence[Answer]) -> list[float | None]:
        """The count for each answer; None for one without words."""
        return [self._count(split_words(answer.text.replace("\u2019", "'"))) for answer in answers]

    def _count(self, words: list[str]) -> float | None:
        return float(len(self._lexicon & set(words))) if words else None


@cache
def read_lexicons() -> dict[str, frozenset[str]]:
    """The words of each style, as `split_words` spells them."""
    lexicons = json.loads(LEXICON_FILE.read_text(encoding="utf-8"))
    return {
        style: frozenset(w for text in words for w in split_words(text)) for style, words in lexicons.items()
    }
