"""Rotary frequencies: the table that `kernels.rope.rotate` reads."""

from __future__ import annotations

import torch
from torch import Tensor


class RotaryTable:
    """cos and sin of every position up to `length`, float32, ready for the half-split rotation.

    sin carries the sign of its half: x · cos + swap(x) · sin.
    """

    def __init__(self, head_dim: int, theta: float, length: int, device: torch.device) -> None:
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
        angles = torch.outer(torch.arange(length, dtype=torch.float32, device=device), theta**-exponents)
        self._cos = torch.cat((angles.cos(), angles.cos()), -1)
        self._sin = torch.cat((-angles.sin(), angles.sin()), -1)

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin), each [tokens, 1, head_dim]."""
        return self._cos[positions, None], self._sin[positions, None]
