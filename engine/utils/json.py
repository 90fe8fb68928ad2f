"""Standard JSON output: ASCII, on one line, without NaN and infinities."""

from __future__ import annotations

import json
import math
from typing import Any

COMPACT = (",", ":")


def dumps(value: Any, separators: tuple[str, str] | None = None) -> str:
    """One line of ASCII JSON. NaN and infinities, which JSON lacks, become null."""
    try:
        return json.dumps(value, allow_nan=False, separators=separators)
    except ValueError:
        return json.dumps(_replace_nonfinite(value), allow_nan=False, separators=separators)


def _replace_nonfinite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _replace_nonfinite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_replace_nonfinite(item) for item in value]
    return value
