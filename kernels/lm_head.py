"""The last product of a step and its steering: from hidden states to the next token of each request."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from .steer import Choice, steer
from .steer_table import Edits, Groups, SteerTable


def product(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden Wᵀ in float32, whatever the type of hidden [rows, width] and weight [vocab, width]."""
    if hidden.is_cuda and hidden.dtype != torch.float32:
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)  # rounded logits would be amplified
    return functional.linear(hidden.float(), weight.float())


def lm_head_steer(
    hidden: Tensor,
    weight: Tensor,
    groups: Groups,
    table: SteerTable,
    edits: Edits | None = None,
    *,
    trace: bool = True,
    top: bool = False,
) -> Choice:
    """`steer` of the logits hidden Wᵀ: hidden [rows, width] after the final norm, weight [vocab, width]."""
    return steer(product(hidden, weight), groups, table, edits, trace=trace, top=top)
