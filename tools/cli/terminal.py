"""Terminal output: text made safe to print, messages on stderr."""

from __future__ import annotations

import os
import re
import sys

UNSAFE_CHARS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters but tab and newline, overrides of writing direction, halves of surrogate pairs."""


def escape(text: str) -> str:
    r"""Text that cannot command a terminal: what could is written out, such as `\x1b`."""
    return UNSAFE_CHARS.sub(_escape_char, text.replace("\r\n", "\n"))


def _escape_char(match: re.Match[str]) -> str:
    code = ord(match.group())
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def is_tty() -> bool:
    """True where a person watches: stdout is a terminal that can move its cursor."""
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


def log_line(message: str) -> None:
    """One line on stderr, signed."""
    print(f"trimtab: {escape(' '.join(message.split()))}", file=sys.stderr, flush=True)
