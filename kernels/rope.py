"""Rotary position embedding in the half-split layout: (x1, x2) → (x1 cos − x2 sin, x2 cos + x1 sin)."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x, cos, sin [tokens, heads, head_dim]; sin has the sign of its half, see `models.rope`: the rotation is
    x · cos + swap(x) · sin. A head with cos 1 and sin 0 stays as it is."""
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin)
