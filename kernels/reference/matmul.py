"""Reference of the Triton matmul in plain torch: y = x Wᵀ + b."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

Matmul = Callable[[Tensor, Tensor, Tensor | None, torch.dtype | None], Tensor]
"""The signature of `matmul` below."""


def matmul(x: Tensor, weight: Tensor, bias: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """x [rows, in], weight [out, in], bias [out] → [rows, out]: summed in at least float32, rounded once.

    dtype: dtype of the result; None for that of x.
    """
    acc_dtype = torch.promote_types(x.dtype, torch.float32)
    out = functional.linear(
        x.to(acc_dtype), weight.to(acc_dtype), None if bias is None else bias.to(acc_dtype)
    )
    return out.to(dtype or x.dtype)
