"""The gated activation of the feed-forward: silu(gate) · up."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

SERIAL_NUMEL = 32768
"""Numbers up to which torch works in one thread. Beyond, it cuts wherever the count of threads falls, and the
last few numbers before a cut get another exponential than those that fill a vector."""


def swiglu(gate_up: Tensor) -> Tensor:
    """gate_up [rows, 2 · intermediate], gate first → [rows, intermediate]. A row's bits are its own."""
    gate, up = gate_up.view(len(gate_up), 2, -1).unbind(1)
    if gate.numel() <= SERIAL_NUMEL or gate.device.type != "cpu":
        return functional.silu(gate).mul_(up)
    chunk_rows = max(1, SERIAL_NUMEL // gate.shape[1])
    return torch.cat([functional.silu(chunk) for chunk in gate.split(chunk_rows)]).mul_(up)
