"""Read a request's columns of the steering state in a kernel."""

from __future__ import annotations

import triton
import triton.language as tl

from ...steering.state import COLUMN_INDEX


def column(name: str) -> tl.constexpr:
    """The index of a column, for `load_param`."""
    return tl.constexpr(COLUMN_INDEX[name])


@triton.jit
def load_param(params_ptr, params_stride, state_row, COLUMN: tl.constexpr, mask=None, other=None):
    """A column of the requests `state_row`, float64; params_stride: the number of rows that the state has."""
    return tl.load(params_ptr + COLUMN * params_stride + state_row, mask=mask, other=other)
