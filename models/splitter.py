"""Where added tokens stand in a text."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from .vocabulary import Found

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tokenizers import AddedToken

    from .vocabulary import Place


class Splitter:
    """Finds tokens, given with their ids and the place of what follows: the leftmost, then the longest."""

    def __init__(self, tokens: Iterable[tuple[AddedToken, int, Place]]) -> None:
        longest_first = sorted(tokens, key=lambda entry: -len(entry[0].content))
        self._ends = [(index, then) for _, index, then in longest_first]
        self._pattern = re.compile("|".join(_pattern(token) for token, *_ in longest_first) or "(?!)")

    def find(self, text: str) -> list[Found]:
        """What stands in the text, in order."""
        matches = self._pattern.finditer(text)
        return [Found(*match.span(), *self._ends[(match.lastindex or 0) - 1]) for match in matches]


def _pattern(token: AddedToken) -> str:
    """The token as one group, and the white space that goes with it."""
    word = (
        rf"(?<!\w)({re.escape(token.content)})(?!\w)"
        if token.single_word
        else f"({re.escape(token.content)})"
    )
    return r"\s*" * token.lstrip + word + r"\s*" * token.rstrip
