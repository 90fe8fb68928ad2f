"""Format of an answer: lines that are bullets or headings, sentences, paragraphs."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, ClassVar

from ....kernels.common.errors import InputError, short_repr
from .text import split_sentences, split_words

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from .answer import Answer

BULLET = re.compile(r"^\s*(?:[-*+•]|\d{1,3}[.)])\s+\S", re.MULTILINE)
HEADING = re.compile(r"^#{1,6}\s+\S|^\*\*[^*\n]+\*\*:?\s*$", re.MULTILINE)
PARAGRAPH_END = re.compile(r"\n\s*\n")

COUNTS: dict[str, Callable[[str], int]] = {
    "bullets": lambda text: len(BULLET.findall(text)),
    "headings": lambda text: len(HEADING.findall(text)),
    "sentences": lambda text: len(split_sentences(text)),
    "paragraphs": lambda text: len(PARAGRAPH_END.split(text.strip())),
}


class Format:
    """How many bullets (numbered ones too), headings, sentences or paragraphs an answer has."""

    scale: ClassVar[tuple[float, float] | None] = None

    def __init__(self, argument: str) -> None:
        if argument not in COUNTS:
            raise InputError(
                f"the scorer format has the argument {short_repr(argument)}; "
                f"it must be one of {', '.join(COUNTS)}"
            )
        self.name, self._count = f"format:{argument}", COUNTS[argument]

    def score(self, answers: Sequence[Answer]) -> list[float | None]:
        """The count for each answer; None for one without words."""
        return [float(self._count(each.text)) if split_words(each.text) else None for each in answers]
