"""What a weight format is: how weights are stored, what they weigh, and how they are multiplied."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

GatedLayer = Callable[[Tensor], Tensor]
"""silu(x Gᵀ + g) · (x Uᵀ + u), the first half of a gated feed-forward: [rows, in] → [rows, out]."""


class LinearLayer(Protocol):
    """A linear layer: maps activations [rows, in] to [rows, out], both in the format's `compute_dtype`.

    On a CPU with `invariant_rows` rows, a row's bits do not depend on the other rows.
    """

    def __call__(self, x: Tensor) -> Tensor:
        """x Wᵀ + b."""

    def add_residual(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual + x Wᵀ + b, all [rows, out]; may reuse the residual's memory."""


class WeightFormat(ABC):
    """A way to store weights.

    compute_dtype:     the dtype of activations and results.
    bytes_per_weight:  memory of a stored weight, in bytes; includes scales and the like.
    """

    compute_dtype: torch.dtype
    bytes_per_weight: float

    @abstractmethod
    def create(self, weight: Tensor, bias: Tensor | None) -> LinearLayer:
        """A layer of a weight [out, in] and an optional bias [out], as read from the checkpoint."""

    def create_gated(
        self,
        gate: Tensor,
        up: Tensor,
        biases: tuple[Tensor, Tensor] | None,
        swiglu: Callable[[Tensor], Tensor],
    ) -> GatedLayer:
        """A gated layer of two weights [out, in] and their biases.

        swiglu: activation of [rows, 2 · out], gate first; a format may fuse its own into the products.
        """
        gate_up = self.create(torch.cat((gate, up)), None if biases is None else torch.cat(biases))
        return lambda x: swiglu(gate_up(x))
