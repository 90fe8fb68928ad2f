"""y = x Wᵀ, with W made ready once for the machine that multiplies it.

On a CPU without bfloat16 arithmetic (no AMX, no AVX512-BF16) a bfloat16 or float16 product is emulated and
slower than a float32 one from one row on, so there the values are kept but held and multiplied in float32.
oneDNN's blocked layout makes a product of a few rows cost about what one row costs, which is what decodes
K + 1 branches at the price of one; measurements are in docs/findings/cpu-matmul.md.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

ROWS_HINT = 256
"""The row count that oneDNN's layout is chosen for: as good at one row as the layouts made for few rows."""


def arithmetic_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The type in which a model stored as `dtype` computes on `device`."""
    if device.type != "cpu" or dtype == torch.float32:
        return dtype
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return dtype if dtype == torch.bfloat16 and native else torch.float32


class Linear:
    """A weight [out, in]; calling it maps [rows, in] to [rows, out] in the weight's arithmetic type.

    A single row is multiplied as two, because one row alone takes another code path with other rounding:
    so a row's result does not depend on how many rows stand beside it.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        self.out_features, self.in_features = weight.shape
        self.dtype = dtype
        self._packed = (
            weight.device.type == "cpu" and dtype == torch.float32 and torch.backends.mkldnn.is_available()
        )
        weight = weight.to(dtype)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS_HINT) if self._packed else weight

    def __call__(self, x: Tensor) -> Tensor:
        x = x.to(self.dtype)
        return self._multiply(x.expand(2, -1))[:1] if len(x) == 1 else self._multiply(x)

    def _multiply(self, x: Tensor) -> Tensor:
        if not self._packed:
            return functional.linear(x, self._weight)
        product: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, None, "none", [], "")
        return product
