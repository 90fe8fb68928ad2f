"""Terminal output: escaping of control characters, and messages on stderr."""

from __future__ import annotations

import os
import re
import sys

UNSAFE_CHARS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters except tab and newline, bidirectional overrides, lone surrogates."""


def escape(text: str) -> str:
    r"""Escape what could control a terminal, such as ESC to `\x1b`."""
    return UNSAFE_CHARS.sub(_escape_char, text.replace("\r\n", "\n"))


def _escape_char(match: re.Match[str]) -> str:
    code = ord(match.group())
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def is_tty() -> bool:
    """Whether stdout is a terminal that can move its cursor."""
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


def log_line(message: str) -> None:
    """Print a message as one line on stderr, prefixed with `trimtab: `."""
    print(f"trimtab: {escape(' '.join(message.split()))}", file=sys.stderr, flush=True)
