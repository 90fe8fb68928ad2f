"""Which characters of a rendered prompt come from outside the template, so that nobody can forge a turn.

A text that holds something like an added token is rendered a second time, in letters that stand nowhere else.
Templates trim, cut and search such texts, so the letters can be searched for what they stand for. When the
second rendering says the same as the first, letter by letter, these letters show what is from outside.
"""

from __future__ import annotations

from itertools import chain
from typing import TYPE_CHECKING, Any

from ..kernels.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

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
) -> tuple[str, set[int] | None]:
    """The conversation as one text, and the places in it of characters that are not to be trusted.

    These are the visible characters of every text in `messages` and `extra` that holds what may be read as an
    added token; None where none does. Raises InputError when the template cannot render the conversation, or
    changes such a text in a way that cannot be followed.
    """
    texts: set[str] = set()

    def noted(text: str) -> str:
        texts.add(text)
        return text

    rendered = template.render_spelled(messages, extra, noted)
    suspects = {text: token for text in texts if (token := tokenizer.added_token_in(text))}
    if not suspects:
        return rendered, None
    cipher = _cipher(set().union(*suspects), set(rendered + template.source).union(*texts))
    clear = {ord(letter): chr(code) for code, letter in cipher.items()}
    try:
        other = template.render_spelled(
            messages, extra, lambda text: Disguised(text, cipher) if text in suspects else text
        )
    except InputError:
        other = ""
    if other.translate(clear) != rendered:
        raise InputError(
            f"a text of the conversation holds {min(suspects.values())!r}, a token of the model, and the "
            "chat template rewrites that text; leave the token out"
        )
    return rendered, {place for place, letter in enumerate(other) if ord(letter) in clear}


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
    free = [letter for letter in map(chr, chain(*PRIVATE)) if letter not in taken]
    if len(free) < len(visible):
        raise InputError(
            f"a text of the conversation has {len(visible)} different letters; {len(free)} would do"
        )
    return dict(zip(map(ord, visible), free, strict=False))
