"""The gated activation of the feed-forward: silu(gate) · up."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def swiglu(gate_up: Tensor) -> Tensor:
    """gate_up [rows, 2 · intermediate], gate first → [rows, intermediate]."""
    gate, up = gate_up.view(len(gate_up), 2, -1).unbind(1)
    return functional.silu(gate).mul_(up)
