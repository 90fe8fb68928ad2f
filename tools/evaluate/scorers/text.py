"""Words and sentences as all scorers count them."""

from __future__ import annotations

import re

from ....kernels.common.errors import InputError

WORD_PATTERN = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")
SENTENCE_END_PATTERN = re.compile(r"(?<=[.!?…])[\"'\u201d\u2019)\]]*\s+|\n+")


def split_words(text: str) -> list[str]:
    """The words of a text, in lower case: letters and digits, and what an apostrophe or a hyphen joins."""
    return [word.lower() for word in WORD_PATTERN.findall(text)]


def split_sentences(text: str) -> list[str]:
    """The sentences of a text: what a mark and a space, or a line's end, closes."""
    return [sentence.strip() for sentence in SENTENCE_END_PATTERN.split(text) if sentence.strip()]


def require_no_argument(name: str, argument: str) -> None:
    """Raises InputError when a scorer that takes no argument is given one."""
    if argument:
        raise InputError(f"the scorer {name} takes no argument, but was given {argument!r}")
