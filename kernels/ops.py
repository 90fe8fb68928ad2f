"""The operations that a decoder is made of, as one value that names their implementation."""

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
    """One implementation of each operation; shapes are in the docstrings of the functions named alike.

    make_lm_head: makes the vocabulary's product of its weight and the logits' soft cap, None for none; the
    backend's `sample` takes it.
    matmul: what multiplies by weights; None leaves it to `kernels.cpu.linear`, which takes what is fastest.
    """

    rms_norm: Callable[[Tensor, Tensor, Tensor], Tensor]
    swiglu: Callable[[Tensor], Tensor]
    make_lm_head: Callable[[Tensor, float | None], AnyLMHead]
    matmul: Matmul | None = None


TORCH_OPS = Ops(rms_norm=rms_norm, swiglu=swiglu, make_lm_head=make_lm_head)
"""The torch references."""
