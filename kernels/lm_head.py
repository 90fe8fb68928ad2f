"""The last product of a step and its steering: from hidden states to the next token of each request."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .cpu.linear import Linear
from .reference.matmul import matmul
from .steering.state import Edits, Groups, SteerTable
from .steering.step import Choice, steer


def product(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden Wᵀ in float32, whatever the type of hidden [rows, width] and weight [vocab, width]."""
    if hidden.is_cuda and hidden.dtype != torch.float32:
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)  # rounded logits would be amplified
    return matmul(hidden.float(), weight.float())


class Head:
    """`product` with a weight [vocab, width], as it is. `dtype` is what it takes hidden states in.

    product: what multiplies, where it is not this one.
    """

    def __init__(self, weight: Tensor, product: Callable[[Tensor, Tensor], Tensor] = product) -> None:
        self.weight, self.dtype, self._product = weight, weight.dtype, product

    def __call__(self, hidden: Tensor) -> Tensor:
        return self._product(hidden, self.weight)


class PackedHead:
    """As `Head`, of a weight that is packed once for a CPU's product."""

    dtype = torch.float32

    def __init__(self, weight: Tensor) -> None:
        self._product = Linear(weight, dtype=self.dtype)

    def __call__(self, hidden: Tensor) -> Tensor:
        return self._product(hidden)


AnyHead = Head | PackedHead


def ready(weight: Tensor) -> AnyHead:
    """A weight as its device multiplies best by it."""
    return PackedHead(weight) if weight.device.type == "cpu" else Head(weight)


def choose(
    head: AnyHead,
    hidden: Tensor,
    groups: Groups,
    table: SteerTable,
    edits: Edits | None = None,
    *,
    trace: bool = True,
    top: bool = False,
    by: Callable[..., Choice] = steer,
) -> Choice:
    """The product, and then the steering `by`: see `kernels.steering.step.steer`.

    hidden [rows, width] after the final norm; rows beyond those of the groups only fill the product up.
    """
    logits = head(hidden)[: len(groups.branch)]
    return by(logits, groups, table, edits, trace=trace, top=top)


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
    """`choose` with a weight [vocab, width] that nothing was made of yet."""
    return choose(Head(weight), hidden, groups, table, edits, trace=trace, top=top)
