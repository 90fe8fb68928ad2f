"""Operand constraints of `tl.dot`."""

from __future__ import annotations

import os

MIN_DOT_M = 16
"""Minimum number of rows of a tensor-core product."""
UPCAST = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether operands are converted to float32 first: the interpreter has no bfloat16 arithmetic."""
