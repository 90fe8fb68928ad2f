"""Causal and sliding-window attention masks."""

from __future__ import annotations

import torch
from torch import Tensor

MASK_VALUE = -1e30
"""The score of a key that may not be seen; finite, so that a page with no visible key makes no NaN."""


def is_masked(key_pos: Tensor, query_pos: Tensor, window: int | None) -> Tensor:
    """Whether the key at a position is hidden from the token at a position; with a window that sees itself
    and the window − 1 before it."""
    masked = key_pos > query_pos
    if window is not None:
        masked |= key_pos <= query_pos - window
    return masked


def mask_bias(key_pos: Tensor, query_pos: Tensor, window: int | None) -> Tensor:
    """0 where the token at a position sees the key at a position, else HIDDEN; float32 on the CPU."""
    masked = is_masked(key_pos, query_pos, window)
    return torch.zeros(masked.shape).masked_fill_(masked, MASK_VALUE)
