"""Words and sentences as all scorers count them."""

from __future__ import annotations

import re

from ....kernels.common.errors import InputError

WORD = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")
SENTENCE_END = re.compile(r"(?<=[.!?…])[\"'\u201d\u2019)\]]*\s+|\n+")


def words(text: str) -> list[str]:
    """The words of a text, in lower case: letters and digits, and what an apostrophe or a hyphen joins."""
    return [word.lower() for word in WORD.findall(text)]


def sentences(text: str) -> list[str]:
    """The sentences of a text: what a mark and a space, or a line's end, closes."""
    return [part.strip() for part in SENTENCE_END.split(text) if part.strip()]


def without_argument(name: str, argument: str) -> None:
    """Raises InputError when a scorer that takes no argument is given one."""
    if argument:
        raise InputError(f"the scorer {name} takes no argument, but was given {argument!r}")
