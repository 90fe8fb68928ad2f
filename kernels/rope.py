"""Rotary position embedding in the half-split layout: (x1, x2) → (x1 cos − x2 sin, x2 cos + x1 sin)."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [tokens, heads, head_dim]; cos, sin [tokens, 1, head_dim] from `models.rope`, sin with the sign of
    its half, so that the rotation is x · cos + swap(x) · sin."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)
