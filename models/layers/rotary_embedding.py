"""Rotary position embedding (RoPE) and its context-extension scalings.

A head of size d consists of d/2 pairs. At position p, pair i is rotated by the angle p ω_i, unscaled
ω_i = θ^(−2i/d). To extend the context beyond that of training, most scalings lower the frequencies:

    ω_i ← ω_i (s_i + (1 − s_i) / factor)

A pair with s_i = 1 keeps its frequency (extrapolation); one with s_i = 0 rotates `factor` times slower
(interpolation).
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
    """Unscaled RoPE (Su et al., 2021), and the base class of the scalings.

    attention_factor: multiplies cos and sin.
    """

    rope_type: ClassVar[str] = "default"
    theta: float
    factor: float = 1.0
    attention_factor: float = 1.0

    def extrapolation_factor(self, inv_freq: Tensor) -> Tensor:
        """s [head_dim / 2] for the unscaled frequencies ω [head_dim / 2]."""
        return torch.ones_like(inv_freq)

    def inv_freq(self, head_dim: int) -> Tensor:
        """Scaled frequencies ω [head_dim / 2] in radians per position, float32."""
        base_inv_freq = 1.0 / self.theta ** _exponents(head_dim)
        extrapolation = self.extrapolation_factor(base_inv_freq)
        return base_inv_freq * (extrapolation + (1 - extrapolation) / self.factor)

    def context_length(self, max_position: int) -> int:
        """The maximum context, for config.json's max_position_embeddings."""
        return max_position

    def rope_length(self, max_prompt_len: int) -> int:
        """The length that dynamic RoPE scales by, for a request whose longest prompt has `max_prompt_len`
        tokens; 0 for other types, which do not depend on it.
        """
        return 0


@dataclass(frozen=True, kw_only=True)
class LinearRope(Rope):
    """Position interpolation (Chen et al., 2023): every pair rotates `factor` times slower."""

    rope_type = "linear"

    def extrapolation_factor(self, inv_freq: Tensor) -> Tensor:
        return torch.zeros_like(inv_freq)

    def context_length(self, max_position: int) -> int:
        return _scale_context(max_position, self.factor)


@dataclass(frozen=True, kw_only=True)
class Llama3Rope(Rope):
    """Llama 3.1: s rises linearly from 0 to 1 between `low_freq_factor` and `high_freq_factor` rotations
    within the `original_max_position` context.
    """

    rope_type = "llama3"
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int

    def extrapolation_factor(self, inv_freq: Tensor) -> Tensor:
        rotations = self.original_max_position / (2 * math.pi / inv_freq)
        return ((rotations - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)).clamp(
            0, 1
        )


@dataclass(frozen=True, kw_only=True)
class YarnRope(Rope):
    """YaRN (Peng et al., 2023): s falls linearly in i from 1, at the pair that makes `beta_fast` rotations
    within the `original_max_position` context, to 0, at the pair that makes `beta_slow`; `truncate` rounds
    both indices outward.
    """

    rope_type = "yarn"
    original_max_position: int
    beta_fast: float
    beta_slow: float
    truncate: bool

    def extrapolation_factor(self, inv_freq: Tensor) -> Tensor:
        num_pairs = len(inv_freq)
        low, high = (
            self._correction_dim(self.beta_fast, num_pairs),
            self._correction_dim(self.beta_slow, num_pairs),
        )
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * num_pairs - 1)
        ramp = (torch.arange(num_pairs, dtype=torch.float32) - low) / ((high - low) or 0.001)
        return 1 - ramp.clamp(0, 1)

    def _correction_dim(self, num_rotations: float, num_pairs: int) -> float:
        """The fractional pair i that makes this many rotations: n θ^(−i/num_pairs) = 2π num_rotations."""
        return (
            num_pairs
            * math.log(self.original_max_position / (2 * math.pi * num_rotations))
            / math.log(self.theta)
        )

    def context_length(self, max_position: int) -> int:
        return max(max_position, _scale_context(self.original_max_position, self.factor))


@dataclass(frozen=True, kw_only=True)
class DynamicRope(Rope):
    """Dynamic NTK: θ grows with the length L once it exceeds the `original_max_position` context n:

        θ ← θ (factor · L/n − (factor − 1))^(d / (d − 2))

    L is the length of a request's longest prompt and stays constant during decoding. transformers instead
    recomputes L at every step from the longest sequence of the batch, without rotating the cached keys again:
    there an answer depends on how it was batched and cached.
    """

    rope_type = "dynamic"
    original_max_position: int

    def rope_length(self, max_prompt_len: int) -> int:
        return max(max_prompt_len, self.original_max_position)

    def dynamic_inv_freq(self, head_dim: int, rope_lengths: Tensor) -> Tensor:
        """ω [tokens, head_dim / 2] for the L of each token's request, `rope_lengths` [tokens]."""
        stretch = self.factor * rope_lengths.clamp(
            min=self.original_max_position
        ).float() / self.original_max_position - (self.factor - 1)
        theta = self.theta * stretch ** (head_dim / (head_dim - 2))
        return 1.0 / theta[:, None] ** _exponents(head_dim, rope_lengths.device)

    def context_length(self, max_position: int) -> int:
        return _scale_context(max_position, self.factor)


def _scale_context(length: int, factor: float) -> int:
    """`length` · `factor`, at most MAX_SIZE = 2²⁴, up to which float32 represents every position."""
    return int(min(length * factor, MAX_SIZE))


def _exponents(head_dim: int, device: torch.device | None = None) -> Tensor:
    return torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim


class RotaryEmbedding:
    """cos and sin of a step's positions in float32, for the half-split (NeoX-style) rotation.

    They are computed per step rather than tabulated, so an unused long context costs no memory.
    """

    def __init__(self, rope: Rope, head_dim: int, device: torch.device) -> None:
        self._rope, self._head_dim = rope, head_dim
        self._inv_freq = _concat_signed(rope.inv_freq(head_dim).to(device))

    def cos_sin(self, positions: Tensor, rope_lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(cos, sin), each [tokens, head_dim].

        sin is negated in the first half, so the rotation is x · cos + swap(x) · sin, where swap exchanges the
        halves. `rope_lengths` [tokens]: the `Rope.rope_length` of each token's request, for dynamic RoPE.
        """
        inv_freq = self._inv_freq
        if isinstance(self._rope, DynamicRope):
            assert rope_lengths is not None, "dynamic RoPE needs rope_lengths"
            inv_freq = _concat_signed(self._rope.dynamic_inv_freq(self._head_dim, rope_lengths))
        angles = positions[:, None] * inv_freq
        cos, sin = angles.cos(), angles.sin()
        if self._rope.attention_factor != 1:
            cos, sin = cos * self._rope.attention_factor, sin * self._rope.attention_factor
        return cos, sin


def _concat_signed(inv_freq: Tensor) -> Tensor:
    """[…, d/2] → […, d]: negating the first half negates its sin and leaves its cos unchanged."""
    return torch.cat((-inv_freq, inv_freq), -1)
