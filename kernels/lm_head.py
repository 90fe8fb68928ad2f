"""LM head and steering step: from hidden states to the next token of each request."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .common.profiling import in_stage
from .linear.registry import select_format
from .reference.matmul import matmul
from .reference.softcap import softcap_
from .steering.layout import LogitEdits, RequestLayout
from .steering.state import SteeringState
from .steering.step import SamplerOutput, steer


def logits_matmul(hidden: Tensor, weight: Tensor) -> Tensor:
    """hidden Wᵀ in float32, whatever the dtype of hidden [rows, width] and weight [vocab, width]."""
    if hidden.is_cuda and hidden.dtype != torch.float32:
        return torch.mm(hidden, weight.T, out_dtype=torch.float32)  # steering amplifies rounding errors
    return matmul(hidden.float(), weight.float())


class LMHead:
    """LM head with an unpacked weight [vocab, width]. Hidden states must be in `dtype`.

    softcap: of the logits, see `reference.softcap`; None for none.
    matmul_fn: computes hidden Wᵀ; defaults to `logits_matmul`.
    """

    def __init__(
        self,
        weight: Tensor,
        softcap: float | None = None,
        matmul_fn: Callable[[Tensor, Tensor], Tensor] = logits_matmul,
    ) -> None:
        self.weight, self.dtype, self.softcap, self._matmul = weight, weight.dtype, softcap, matmul_fn

    @in_stage("head")
    def __call__(self, hidden: Tensor) -> Tensor:
        logits = self._matmul(hidden, self.weight)
        return logits if self.softcap is None else softcap_(logits, self.softcap)


class PackedLMHead:
    """`LMHead` for a CPU, with a weight that is packed once."""

    dtype = torch.float32

    def __init__(self, weight: Tensor, softcap: float | None = None) -> None:
        head_format = select_format(weight.dtype, weight.device, compute_dtype=self.dtype)
        self.softcap, self._linear = softcap, head_format.create(weight, None)

    @in_stage("head")
    def __call__(self, hidden: Tensor) -> Tensor:
        logits = self._linear(hidden)
        return logits if self.softcap is None else softcap_(logits, self.softcap)


AnyLMHead = LMHead | PackedLMHead


def make_lm_head(weight: Tensor, softcap: float | None = None) -> AnyLMHead:
    """The LM head that is fastest on the weight's device."""
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
    """Compute logits, then run the steering `sampler`: see `kernels.steering.step.steer`.

    hidden [rows, width] after the final norm; rows beyond those of the layout are padding.
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
    """`sample_from_hidden` with a plain weight [vocab, width]."""
    return sample_from_hidden(LMHead(weight), hidden, layout, state, edits, trace=trace, top=top)
