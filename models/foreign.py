"""Which characters of a rendered prompt come from outside the template, so that nobody can forge a turn.

Texts from outside are rendered a second time in letters that stand nowhere else. Templates trim, cut and
search such texts, so the letters can be searched for what they stand for. When the second rendering says the
same as the first, letter by letter, these letters show what is from outside.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

from ..kernels.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Mapping, Sequence

    from .template import ChatTemplate, Message
    from .tokenizer import Tokenizer

PRIVATE = (range(0xF0000, 0xFFFFE), range(0x100000, 0x10FFFE))
"""Code points that Unicode leaves to private use."""
ESCAPED = frozenset('"\\')
"""Letters that templates writing JSON put a backslash before, which no other letter would get."""
SEARCHES = (
    *("__contains__", "__eq__", "__getitem__", "__ne__", "count", "endswith", "find", "index", "lstrip"),
    *("partition", "removeprefix", "removesuffix", "replace", "rfind", "rindex", "rpartition", "rsplit"),
    *("rstrip", "split", "splitlines", "startswith", "strip"),
)


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
    texts: list[tuple[str, str]] = []

    def noted(text: str, place: str) -> str:
        texts.append((text, place))
        return text

    rendered = template.render_spelled(messages, extra, noted)
    suspects = {text: token for text, _ in texts if (token := tokenizer.added_token_in(text))}
    taken = set(rendered + template.source).union(*(text for text, _ in texts))

    def followed(is_outside: Callable[[str, str], bool]) -> _Places | None:
        cipher = _cipher(set().union(*(text for text, place in texts if is_outside(text, place))), taken)
        clear = {ord(letter): chr(code) for code, letter in cipher.items()}

        def spelled(text: str, place: str) -> str:
            return Disguised(text, cipher) if is_outside(text, place) else text

        try:
            other = template.render_spelled(messages, extra, spelled)
        except InputError:
            return None
        return _Places(other, frozenset(cipher.values())) if other.translate(clear) == rendered else None

    places = followed(lambda text, place: _is_said(place) or text in suspects)
    if places is None and suspects:
        places = followed(lambda text, place: text in suspects)
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


class Disguised(str):
    """A text in other letters, which can be searched as if it stood in its own."""

    _cipher: dict[int, str]

    def __new__(cls, text: str, cipher: dict[int, str]) -> Disguised:
        made = super().__new__(cls, text.translate(cipher))
        made._cipher = cipher
        return made

    def _spelled(self, value: Any) -> Any:
        """What is looked for, in these letters."""
        if isinstance(value, tuple):
            return tuple(map(self._spelled, value))
        return value.translate(self._cipher) if isinstance(value, str) else value

    def _like(self, value: Any) -> Any:
        """What was found, to be searched in turn."""
        if isinstance(value, list | tuple):
            return type(value)(map(self._like, value))
        return Disguised(value, self._cipher) if isinstance(value, str) else value


def _search(name: str) -> Callable[..., Any]:
    method = getattr(str, name)

    def search(self: Disguised, *args: Any, **kwargs: Any) -> Any:
        named = {key: self._spelled(value) for key, value in kwargs.items()}
        return self._like(method(self, *map(self._spelled, args), **named))

    return search


for _name in SEARCHES:
    setattr(Disguised, _name, _search(_name))


def _cipher(letters: set[str], taken: set[str]) -> dict[int, str]:
    """For each visible letter another that is not taken."""
    visible = [letter for letter in letters - ESCAPED if letter.isprintable() and not letter.isspace()]
    free = (letter for letter in map(chr, chain(*PRIVATE)) if letter not in taken)
    cipher = dict(zip(map(ord, visible), free, strict=False))
    if len(cipher) < len(visible):
        raise InputError(
            f"a text of the conversation has {len(visible)} different letters; at most {len(cipher)} will do"
        )
    return cipher
