"""The turns of a step: what rotary embedding multiplies heads by at each of its positions."""

from __future__ import annotations

import torch
from torch import Tensor

from .rope import DynamicRope, Rope


class Rotary:
    """cos and sin of the positions of a step, float32, ready for the half-split rotation.

    They are computed as they are needed, so that a long context costs nothing before it is used.
    """

    def __init__(self, rope: Rope, head_dim: int, device: torch.device) -> None:
        self._rope, self._head_dim = rope, head_dim
        self._turns = _both_ways(rope.frequencies(head_dim).to(device))

    def at(self, positions: Tensor, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(cos, sin), each [tokens, head_dim].

        sin carries the sign of its half: x · cos + swap(x) · sin. `lengths` [tokens] are what each token's
        request turns by, and are needed where the rope is dynamic.
        """
        turns = self._turns
        if isinstance(self._rope, DynamicRope):
            assert lengths is not None, "a dynamic rope turns by the length of the prompt"
            turns = _both_ways(self._rope.frequencies_at(self._head_dim, lengths))
        angles = positions[:, None] * turns
        cos, sin = angles.cos(), angles.sin()
        if self._rope.magnitude != 1:
            cos, sin = cos * self._rope.magnitude, sin * self._rope.magnitude
        return cos, sin


def _both_ways(frequencies: Tensor) -> Tensor:
    """[…, d/2] → […, d]: the first half turns backwards, which changes the sign of sin and not of cos."""
    return torch.cat((-frequencies, frequencies), -1)
