"""Shapes and types that `tl.dot` requires of its operands."""

from __future__ import annotations

import os

MIN_DOT_M = 16
"""Rows that a tensor core's product has at least."""
UPCAST = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether operands are made float32 first: the interpreter has no bfloat16 arithmetic."""
