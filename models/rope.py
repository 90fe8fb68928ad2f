"""Rotary frequencies: the table that `kernels.rope.rotate` reads."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


class RotaryTable:
    """cos and sin of every position up to `length`, float32, ready for the half-split rotation.

    sin carries the sign of its half: x · cos + swap(x) · sin.
    """

    def __init__(self, head_dim: int, theta: float, length: int, device: torch.device) -> None:
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
        angles = torch.outer(torch.arange(length, dtype=torch.float32, device=device), theta**-exponents)
        self._cos = torch.cat((angles.cos(), angles.cos()), -1)
        self._sin = torch.cat((-angles.sin(), angles.sin()), -1)

    def at(self, positions: Tensor, rotated: int, plain: int) -> tuple[Tensor, Tensor]:
        """(cos, sin), each [tokens, rotated + plain, head_dim]: the last `plain` heads are not turned."""
        cos = self._cos[positions, None].expand(-1, rotated, -1)
        sin = self._sin[positions, None].expand(-1, rotated, -1)
        return functional.pad(cos, (0, 0, 0, plain), value=1.0), functional.pad(sin, (0, 0, 0, plain))
