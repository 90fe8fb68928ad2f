"""What an attention layer computes besides softmax(q kᵀ) v, as one value that every implementation takes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AttentionParams:
    """The arguments of one layer's attention; the defaults are causal attention, and cost nothing.

    window: how many tokens a token attends to, itself included; None is all before it. softcap: scores s
    become softcap · tanh(s / softcap) before the mask; None leaves them. The scale of the scores is not here:
    queries come scaled, see `reference.rotary.RotaryCosSin`.
    """

    window: int | None = None
    softcap: float | None = None


CAUSAL = AttentionParams()
"""Each token attends to itself and all before it."""
