"""Root-mean-square normalisation: y = x / sqrt(mean(x²) + ε) · weight, in float32."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x [rows, hidden], weight [hidden] float32 → [rows, hidden] in x's type."""
    wide = x.float()
    scale = torch.rsqrt((wide * wide).mean(-1, keepdim=True) + eps)
    return (wide * scale * weight).to(x.dtype)
