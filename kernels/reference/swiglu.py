"""Reference SwiGLU, the gated activation of the feed-forward: silu(gate) · up."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

SERIAL_NUMEL = 32768
"""Elements up to which torch uses one thread. Beyond, where it splits depends on the number of threads, and
the last elements before a split, which do not fill a SIMD vector, get a different exponential."""


def swiglu(gate_up: Tensor) -> Tensor:
    """gate_up [rows, 2 · intermediate], gate first → [rows, intermediate]. Rows are bitwise independent."""
    gate, up = gate_up.view(len(gate_up), 2, -1).unbind(1)
    if gate.numel() <= SERIAL_NUMEL or gate.device.type != "cpu":
        return functional.silu(gate).mul_(up)
    chunk_rows = max(1, SERIAL_NUMEL // gate.shape[1])
    return torch.cat([functional.silu(chunk) for chunk in gate.split(chunk_rows)]).mul_(up)
