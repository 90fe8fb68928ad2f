"""Reference RMSNorm: y = x / sqrt(mean(x²) + ε) · weight, in float32."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, eps: Tensor) -> Tensor:
    """x [rows, hidden], weight [hidden] and eps [1] float32 → [rows, hidden] in x's dtype.

    For a norm over each head: x [rows, heads, head_dim] and weight [heads, head_dim].
    """
    x_fp32 = x if x.dtype == torch.float32 else x.float()
    # few operations: between two large matmuls, each is dispatched from a cold cache
    l2_norm = torch.linalg.vector_norm(x_fp32, dim=-1, keepdim=True)
    rstd = torch.addcmul(eps, l2_norm, l2_norm, value=1 / x.shape[-1]).rsqrt_()
    y = (x_fp32 * rstd).mul_(weight)
    return y if x.dtype == torch.float32 else y.to(x.dtype)
