"""Where added tokens stand in a text."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from .backend import Found

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tokenizers import AddedToken

    from .backend import Place


class Splitter:
    """Finds tokens, given with their ids and the place of what follows: the leftmost, then the longest."""

    def __init__(self, tokens: Iterable[tuple[AddedToken, int, Place]]) -> None:
        longest_first = sorted(tokens, key=lambda entry: -len(entry[0].content))
        self._tokens = [(token.lstrip, index, then) for token, index, then in longest_first]
        self._pattern = re.compile("|".join(_pattern(token) for token, *_ in longest_first) or "(?!)")

    def find(self, text: str) -> list[Found]:
        """What stands in the text, in order."""
        found: list[Found] = []
        for match in self._pattern.finditer(text):
            lstrip, index, then = self._tokens[(match.lastindex or 0) - 1]
            start, before = match.start(), found[-1].end if found else 0
            while lstrip and start > before and text[start - 1].isspace():  # behind a token of white space
                start -= 1
            found.append(Found(start, match.end(), index, then))
        return found


def _pattern(token: AddedToken) -> str:
    """The token as one group, and the white space that goes with it.

    White space before it is looked at from its beginning alone: from each place in it, a long one would take
    time with the square of its length.
    """
    word = (
        rf"(?<!\w)({re.escape(token.content)})(?!\w)"
        if token.single_word
        else f"({re.escape(token.content)})"
    )
    return r"(?:(?<!\s)\s+)?" * token.lstrip + word + r"\s*" * token.rstrip
