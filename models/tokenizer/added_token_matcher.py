"""Find added tokens in a text with one regular expression."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from .backend import AddedTokenMatch

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tokenizers import AddedToken

    from .backend import TextPosition


class AddedTokenMatcher:
    """Find the leftmost, then longest, of (token, id, TextPosition of the text that follows)."""

    def __init__(self, tokens: Iterable[tuple[AddedToken, int, TextPosition]]) -> None:
        longest_first = sorted(tokens, key=lambda entry: -len(entry[0].content))
        self._tokens = [
            (token.lstrip, token_id, next_position) for token, token_id, next_position in longest_first
        ]
        self._regex = re.compile("|".join(_token_pattern(token) for token, *_ in longest_first) or "(?!)")

    def find_matches(self, text: str) -> list[AddedTokenMatch]:
        """Return the matches in the text, in order."""
        matches: list[AddedTokenMatch] = []
        for match in self._regex.finditer(text):
            lstrip, token_id, next_position = self._tokens[(match.lastindex or 0) - 1]
            start, prev_end = match.start(), matches[-1].end if matches else 0
            # the regex does not match leading whitespace after a token that ends in whitespace
            while lstrip and start > prev_end and text[start - 1].isspace():
                start -= 1
            matches.append(AddedTokenMatch(start, match.end(), token_id, next_position))
        return matches


def _token_pattern(token: AddedToken) -> str:
    """A pattern of the token as one group, with the whitespace that it strips.

    Leading whitespace is matched only from its start: matching from every position would take time quadratic
    in its length.
    """
    word = (
        rf"(?<!\w)({re.escape(token.content)})(?!\w)"
        if token.single_word
        else f"({re.escape(token.content)})"
    )
    return r"(?:(?<!\s)\s+)?" * token.lstrip + word + r"\s*" * token.rstrip
