"""Which keys a token may not see: those after it, and with a window those before that."""

from __future__ import annotations

import torch
from torch import Tensor

HIDDEN = -1e30
"""The score of a key that may not be seen; finite, so that a page with no visible key makes no NaN."""


def is_hidden(key: Tensor, token: Tensor, window: int | None) -> Tensor:
    """Whether the key at a position is hidden from the token at a position; with a window that sees itself
    and the window − 1 before it."""
    hidden = key > token
    if window is not None:
        hidden |= key <= token - window
    return hidden


def hidden_keys(key: Tensor, token: Tensor, window: int | None) -> Tensor:
    """0 where the token at a position sees the key at a position, else HIDDEN; float32 on the CPU."""
    hidden = is_hidden(key, token, window)
    return torch.zeros(hidden.shape).masked_fill_(hidden, HIDDEN)
