"""Word and sentence splitting shared by the scorers."""

from __future__ import annotations

import re

from ....kernels.common.errors import InputError

WORD_PATTERN = re.compile(r"[^\W_]+(?:['\u2019-][^\W_]+)*")
SENTENCE_END_PATTERN = re.compile(r"(?<=[.!?…])[\"'\u201d\u2019)\]]*\s+|\n+")


def split_words(text: str) -> list[str]:
    """The words of a text, in lower case: letters and digits, joined by apostrophes or hyphens."""
    return [word.lower() for word in WORD_PATTERN.findall(text)]


def split_sentences(text: str) -> list[str]:
    """The sentences of a text, split at end punctuation before white space and at line ends."""
    return [sentence.strip() for sentence in SENTENCE_END_PATTERN.split(text) if sentence.strip()]


def require_no_argument(name: str, argument: str) -> None:
    """Raise InputError if a scorer without arguments gets one."""
    if argument:
        raise InputError(f"the scorer {name} takes no argument, got {argument!r}")
