"""Causal and sliding-window attention masks."""

from __future__ import annotations

import torch
from torch import Tensor

MASK_VALUE = -1e30
"""The score of a masked key; finite, so that a block without a visible key gives no NaN."""


def is_masked(key_pos: Tensor, query_pos: Tensor, window: int | None) -> Tensor:
    """Whether the key at `key_pos` is masked for the token at `query_pos`. With a window, a token attends to
    itself and to the window − 1 tokens before it."""
    masked = key_pos > query_pos
    if window is not None:
        masked |= key_pos <= query_pos - window
    return masked


def mask_bias(key_pos: Tensor, query_pos: Tensor, window: int | None) -> Tensor:
    """0 where the key at `key_pos` is visible to the token at `query_pos`, else MASK_VALUE; float32, CPU."""
    masked = is_masked(key_pos, query_pos, window)
    return torch.zeros(masked.shape).masked_fill_(masked, MASK_VALUE)
