"""The operations that a decoder is made of, as one value that names their implementation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from .norm import rms_norm
from .swiglu import swiglu


@dataclass(frozen=True)
class Ops:
    """One implementation of each operation; shapes are in the docstrings of the functions named alike."""

    rms_norm: Callable[[Tensor, Tensor, Tensor], Tensor]
    swiglu: Callable[[Tensor], Tensor]


TORCH = Ops(rms_norm=rms_norm, swiglu=swiglu)
"""The torch references."""
