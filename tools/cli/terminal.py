"""Writing without a terminal's tricks: text made safe to print, sentences on stderr."""

from __future__ import annotations

import os
import re
import sys

UNSAFE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters but tab and newline, overrides of writing direction, halves of surrogate pairs."""


def safe(text: str) -> str:
    r"""Text that cannot command a terminal: what could is written out, such as `\x1b`."""
    return UNSAFE.sub(_written_out, text.replace("\r\n", "\n"))


def _written_out(found: re.Match[str]) -> str:
    code = ord(found.group())
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def watched() -> bool:
    """True where a person watches: stdout is a terminal that can move its cursor."""
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


def say(sentence: str) -> None:
    """One line on stderr, signed."""
    print(f"trimtab: {safe(' '.join(sentence.split()))}", file=sys.stderr, flush=True)
