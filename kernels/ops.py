"""The implementations of a decoder's operations, collected in one value."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from .lm_head import AnyLMHead, make_lm_head
from .reference.matmul import Matmul
from .reference.rms_norm import rms_norm
from .reference.swiglu import swiglu


@dataclass(frozen=True)
class Ops:
    """One implementation of each operation; the functions of the same name document the shapes.

    make_lm_head: builds the LM head from its weight and the soft cap of the logits (None for none), in the
    form that the backend's `sample` expects.
    matmul: multiplies by weights; None for that of the weights' format, see `kernels.linear`.
    """

    rms_norm: Callable[[Tensor, Tensor, Tensor], Tensor]
    swiglu: Callable[[Tensor], Tensor]
    make_lm_head: Callable[[Tensor, float | None], AnyLMHead]
    matmul: Matmul | None = None


TORCH_OPS = Ops(rms_norm=rms_norm, swiglu=swiglu, make_lm_head=make_lm_head)
"""The torch reference implementations."""
