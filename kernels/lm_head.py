"""The LM head and the steering step: from hidden states to the next token of each request."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .cpu.linear import Linear
from .reference.matmul import matmul
from .reference.softcap import softcap_
from .steering.state import LogitEdits, RequestLayout, SteeringState
from .steering.step import SamplerOutput, steer


def logits_matmul(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden Wᵀ in float32, whatever the type of hidden [rows, width] and weight [vocab, width]."""
    if hidden.is_cuda and hidden.dtype != torch.float32:
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)  # rounded logits would be amplified
    return matmul(hidden.float(), weight.float())


class LMHead:
    """`product` with a weight [vocab, width], as it is. `dtype` is what it takes hidden states in.

    softcap: of the logits, see `reference.softcap`; None for none. matmul_fn: what multiplies, where it is
    not this one.
    """

    def __init__(
        self,
        weight: Tensor,
        softcap: float | None = None,
        matmul_fn: Callable[[Tensor, Tensor], Tensor] = logits_matmul,
    ) -> None:
        self.weight, self.dtype, self.softcap, self._matmul = weight, weight.dtype, softcap, matmul_fn

    def __call__(self, hidden: Tensor) -> Tensor:
        logits = self._matmul(hidden, self.weight)
        return logits if self.softcap is None else softcap_(logits, self.softcap)


class PackedLMHead:
    """As `LMHead`, of a weight that is packed once for a CPU's product."""

    dtype = torch.float32

    def __init__(self, weight: Tensor, softcap: float | None = None) -> None:
        self.softcap, self._linear = softcap, Linear(weight, dtype=self.dtype)

    def __call__(self, hidden: Tensor) -> Tensor:
        logits = self._linear(hidden)
        return logits if self.softcap is None else softcap_(logits, self.softcap)


AnyLMHead = LMHead | PackedLMHead


def make_lm_head(weight: Tensor, softcap: float | None = None) -> AnyLMHead:
    """A weight as its device multiplies best by it."""
    return PackedLMHead(weight, softcap) if weight.device.type == "cpu" else LMHead(weight, softcap)


def sample_from_hidden(
    lm_head: AnyLMHead,
    hidden: Tensor,
    layout: RequestLayout,
    state: SteeringState,
    edits: LogitEdits | None = None,
    *,
    trace: bool = True,
    top: bool = False,
    sampler: Callable[..., SamplerOutput] = steer,
) -> SamplerOutput:
    """The product, and then the steering `sampler`: see `kernels.steering.step.steer`.

    hidden [rows, width] after the final norm; rows beyond those of the groups only fill the product up.
    """
    logits = lm_head(hidden)[: len(layout.branch_of_row)]
    return sampler(logits, layout, state, edits, trace=trace, top=top)


def lm_head_steer(
    hidden: Tensor,
    weight: Tensor,
    layout: RequestLayout,
    state: SteeringState,
    edits: LogitEdits | None = None,
    *,
    trace: bool = True,
    top: bool = False,
) -> SamplerOutput:
    """`choose` with a weight [vocab, width] that nothing was made of yet."""
    return sample_from_hidden(LMHead(weight), hidden, layout, state, edits, trace=trace, top=top)
