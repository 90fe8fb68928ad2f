"""The last product of a step and its steering: from hidden states to the next token of each request."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from .linear import Linear
from .steer import Choice, steer
from .steer_table import Edits, Groups, SteerTable


def product(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden Wᵀ in float32, whatever the type of hidden [rows, width] and weight [vocab, width]."""
    if hidden.is_cuda and hidden.dtype != torch.float32:
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)  # rounded logits would be amplified
    return functional.linear(hidden.float(), weight.float())


class Head:
    """`product` with a weight [vocab, width] made ready once. `dtype` is what it takes hidden states in."""

    def __init__(self, weight: Tensor) -> None:
        on_cpu = weight.device.type == "cpu"
        self.dtype = torch.float32 if on_cpu else weight.dtype
        self._product: Callable[[Tensor], Tensor] = (
            Linear(weight, dtype=self.dtype) if on_cpu else partial(product, weight=weight)
        )

    def __call__(self, hidden: Tensor) -> Tensor:
        return self._product(hidden)


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
