"""Writing without a terminal's tricks: text made safe to print, one line of JSON, sentences on stderr."""

from __future__ import annotations

import json
import math
import os
import re
import sys
from typing import Any

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


def json_line(value: Any) -> str:
    """One line of ASCII JSON. Numbers that JSON does not have (NaN, infinities) become null."""
    return json.dumps(_finite(value), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value


def say(sentence: str) -> None:
    """One line on stderr, signed."""
    print(f"trimtab: {safe(' '.join(sentence.split()))}", file=sys.stderr, flush=True)
