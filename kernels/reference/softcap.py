"""The soft cap of attention scores and logits: cap · tanh(x / cap)."""

from __future__ import annotations

from torch import Tensor


def softcap_(x: Tensor, cap: float) -> Tensor:
    """Cap float32 or float64 `x` of any shape to (-cap, cap), in its own memory; returns x."""
    return x.div_(cap).tanh_().mul_(cap)
