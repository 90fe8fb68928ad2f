"""Which characters of a rendered prompt come from outside the template, so that nobody can forge a turn.

Texts from outside are rendered a second time in letters that stand nowhere else. Templates trim, cut and
search such texts, so the letters can be searched for what they stand for. When the second rendering says the
same as the first, letter by letter, these letters show what is from outside.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

from ...kernels.common.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Container, Mapping, Sequence

    from ..tokenizer.tokenizer import Tokenizer
    from .template import ChatTemplate, Choice, Message

PRIVATE = (range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))
"""Code points that Unicode leaves to private use."""
ESCAPED = frozenset('"\\')
"""Letters that templates writing JSON put a backslash before, which no other letter would get."""


def render(
    template: ChatTemplate, tokenizer: Tokenizer, messages: Sequence[Message], extra: Mapping[str, Any]
) -> tuple[str, Container[int]]:
    """The conversation as one text, and the places in it of characters that are not to be trusted.

    These are the visible characters of all that messages say, and of a role or a text in `extra` only when it
    holds what may be read as an added token, for there are templates that write "<|" + role + "|>". Where a
    template so changes a text that it cannot be followed, say to capitals, other messages are trusted too
    unless they hold such a thing.

    Raises InputError when the template cannot render the conversation, or so changes a text that does.
    """
    texts = template.texts(messages, extra)
    suspects = {text: token for text, _ in texts if (token := tokenizer.added_token_in(text))}
    taken = set(template.source).union(*(text for text, _ in texts))

    def followed(is_outside: Choice) -> tuple[str, _Places | None]:
        letters = set[str]().union(*(text for text, place in texts if is_outside(text, place)))
        for _ in range(2):
            plain, other = _cipher(letters, taken)
            rendered, disguised = template.render_both(messages, extra, is_outside, (plain, other))
            if set(other).isdisjoint(rendered):
                break
            taken.update(rendered)  # the template writes such letters itself: others will do
        if disguised is None or disguised.translate(str.maketrans(other, plain)) != rendered:
            return rendered, None
        return rendered, _Places(disguised, frozenset(other))

    rendered, places = followed(lambda text, place: _is_said(place) or text in suspects)
    if places is None and suspects:
        rendered, places = followed(lambda text, place: text in suspects)
        if places is None:
            raise InputError(
                f"a text of the conversation holds {min(suspects.values())!r}, a token of the model, and the "
                "chat template rewrites that text; leave the token out"
            )
    return rendered, places or ()


@dataclass(frozen=True)
class _Places:
    """Where some letters stand in a text."""

    text: str
    letters: frozenset[str]

    def __contains__(self, place: object) -> bool:
        return isinstance(place, int) and self.text[place] in self.letters


def _is_said(place: str) -> bool:
    """Whether a text at this place is something that a message says."""
    return place.startswith("messages[") and not place.endswith("['role']")


def _cipher(letters: set[str], taken: set[str]) -> tuple[str, str]:
    """The visible letters, and for each another that is not taken."""
    visible = [letter for letter in letters - ESCAPED if letter.isprintable() and not letter.isspace()]
    free = (letter for letter in map(chr, chain(*PRIVATE)) if letter not in taken)
    others = [letter for letter, _ in zip(free, visible, strict=False)]
    if len(others) < len(visible):
        raise InputError(
            f"a text of the conversation has {len(visible)} different letters; at most {len(others)} will do"
        )
    return "".join(visible), "".join(others)
