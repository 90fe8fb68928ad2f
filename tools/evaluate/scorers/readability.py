"""Readability indices of the textstat package."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

import textstat

from ....kernels.common.errors import InputError
from .text import split_words

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .answer import Answer

INDICES = (
    "flesch_reading_ease",
    "flesch_kincaid_grade",
    "gunning_fog",
    "smog_index",
    "automated_readability_index",
    "coleman_liau_index",
    "linsear_write_formula",
    "dale_chall_readability_score",
    "mcalpine_eflaw",
)
"""A higher score means easier text for the first, harder text for the others."""


class Readability:
    """A readability index of the answer."""

    scale: ClassVar[tuple[float, float] | None] = None

    def __init__(self, argument: str) -> None:
        self._index = argument or INDICES[0]
        if self._index not in INDICES:
            raise InputError(
                f"unknown index {argument!r} of the scorer textstat; indices are {', '.join(INDICES)}"
            )
        self.name = f"textstat:{self._index}"

    def score(self, answers: Sequence[Answer]) -> list[float | None]:
        """The index of each answer; None for one without words."""
        index = getattr(textstat, self._index)
        return [float(index(answer.text)) if split_words(answer.text) else None for answer in answers]
