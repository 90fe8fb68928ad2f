"""Root-mean-square normalisation: y = x / sqrt(mean(x²) + ε) · weight, in float32."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: Tensor) -> Tensor:
    """x [rows, hidden], weight [hidden] and eps [1] float32 → [rows, hidden] in x's type.

    Heads are normalised each by itself: x [rows, heads, head_dim] and weight [heads, head_dim].
    """
    wide = x if x.dtype == torch.float32 else x.float()
    # few operations on purpose: between two large products, each costs its dispatch from a cold cache
    length = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    scale = torch.addcmul(eps, length, length, value=1 / x.shape[-1]).rsqrt_()
    normed = (wide * scale).mul_(weight)
    return normed if x.dtype == torch.float32 else normed.to(x.dtype)
