"""Rotary position embedding: how fast a model's heads turn.

A head of d numbers is d/2 pairs. At position p pair i is turned by the angle p ω_i, unscaled ω_i = θ^(−2i/d).
To reach beyond the context n of its training a model is given slower turns, most of them by a share s_i:

    ω_i ← ω_i (s_i + (1 − s_i) / factor)

so that a pair with s_i = 1 turns as before and one with s_i = 0 as if positions lay closer together.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..common.config_reader import MAX_SIZE


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary embedding as in its paper (Su et al., 2021): nothing is scaled.

    magnitude: what cos and sin are multiplied by.
    """

    kind: ClassVar[str] = "default"
    theta: float
    factor: float = 1.0
    magnitude: float = 1.0

    def share(self, frequencies: Tensor) -> Tensor:
        """s [head_dim / 2] for the unscaled ω [head_dim / 2]."""
        return torch.ones_like(frequencies)

    def frequencies(self, head_dim: int) -> Tensor:
        """ω [head_dim / 2] in radians a position, float32."""
        omega = 1.0 / self.theta ** _exponents(head_dim)
        share = self.share(omega)
        return omega * (share + (1 - share) / self.factor)

    def context(self, trained: int) -> int:
        """The longest context, for the max_position_embeddings that config.json has."""
        return trained

    def turned_by(self, longest: int) -> int:
        """What a request turns by whose longest prompt has `longest` tokens; 0 where all turn alike."""
        return 0


@dataclass(frozen=True, kw_only=True)
class LinearRope(Rope):
    """Position interpolation (Chen et al., 2023): every pair turns `factor` times slower."""

    kind = "linear"

    def share(self, frequencies: Tensor) -> Tensor:
        return torch.zeros_like(frequencies)

    def context(self, trained: int) -> int:
        return _longer(trained, self.factor)


@dataclass(frozen=True, kw_only=True)
class Llama3Rope(Rope):
    """Llama 3.1: s goes from 0 to 1 between `low` and `high` turns within the `original` context."""

    kind = "llama3"
    low: float
    high: float
    original: int

    def share(self, frequencies: Tensor) -> Tensor:
        turns = self.original / (2 * math.pi / frequencies)
        return ((turns - self.low) / (self.high - self.low)).clamp(0, 1)


@dataclass(frozen=True, kw_only=True)
class YarnRope(Rope):
    """YaRN (Peng et al., 2023): s falls from 1 to 0 along the pairs i, from the one that makes `fast` turns
    within the `original` context to the one that makes `slow`; `truncate` rounds both outward."""

    kind = "yarn"
    original: int
    fast: float
    slow: float
    truncate: bool

    def share(self, frequencies: Tensor) -> Tensor:
        pairs = len(frequencies)
        first, last = self._pair(self.fast, pairs), self._pair(self.slow, pairs)
        if self.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, 2 * pairs - 1)
        ramp = (torch.arange(pairs, dtype=torch.float32) - first) / ((last - first) or 0.001)
        return 1 - ramp.clamp(0, 1)

    def _pair(self, turns: float, pairs: int) -> float:
        """Where along the pairs this many turns are made: n θ^(−i/pairs) = 2π turns, solved for i."""
        return pairs * math.log(self.original / (2 * math.pi * turns)) / math.log(self.theta)

    def context(self, trained: int) -> int:
        return max(trained, _longer(self.original, self.factor))


@dataclass(frozen=True, kw_only=True)
class DynamicRope(Rope):
    """Dynamic NTK: θ grows with the length L of the text, once that exceeds the `original` context n:

        θ ← θ (factor · L/n − (factor − 1))^(d / (d − 2))

    L is the length of a request's longest prompt and stays that while the answer grows. transformers takes L
    anew at every step from the longest sequence of the batch, and leaves keys that are in the cache as they
    were turned before: there an answer depends on how it was batched and cached.
    """

    kind = "dynamic"
    original: int

    def turned_by(self, longest: int) -> int:
        return max(longest, self.original)

    def frequencies_at(self, head_dim: int, lengths: Tensor) -> Tensor:
        """ω [tokens, head_dim / 2] where each token's request turns by `lengths` [tokens]."""
        stretch = self.factor * lengths.clamp(min=self.original).float() / self.original - (self.factor - 1)
        theta = self.theta * stretch ** (head_dim / (head_dim - 2))
        return 1.0 / theta[:, None] ** _exponents(head_dim, lengths.device)

    def context(self, trained: int) -> int:
        return _longer(trained, self.factor)


def _longer(length: int, factor: float) -> int:
    """A context `factor` times as long, at most what float32 still counts one by one."""
    return int(min(length * factor, MAX_SIZE))


def _exponents(head_dim: int, device: torch.device | None = None) -> Tensor:
    return torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim


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
