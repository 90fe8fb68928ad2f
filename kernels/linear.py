"""y = x Wᵀ, with W made ready once for the machine that multiplies it.

A CPU without bfloat16 arithmetic (no AMX, no AVX512-BF16) emulates a bfloat16 product, slowly. There, weights
of two bytes are held as float16 and multiplied with float32 activations and sums by FBGEMM, which reads two
bytes a weight and takes hardly longer for eight rows than for one: that is what decodes K + 1 branches at the
price of one. A bfloat16 weight of magnitude 7.6e-6 to 65,504 is the same number in float16; a smaller one
moves by at most 3e-8, and a tensor with a larger one is held in float32. float32 weights go to oneDNN.
Measurements: docs/findings/cpu-decoding.md.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

ROWS_HINT = 256
"""The row count that oneDNN's layout is chosen for: as good at one row as the layouts made for few rows."""


def arithmetic_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The type of activations in a model stored as `dtype` on `device`."""
    if device.type != "cpu" or dtype == torch.float32:
        return dtype
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return dtype if dtype == torch.bfloat16 and native else torch.float32


class Linear:
    """A weight [out, in]; calling it maps activations [rows, in] to [rows, out], both of type `dtype`.

    With FBGEMM and oneDNN a row's result does not depend on how many rows stand beside it; with torch's own
    product, where neither is there or bfloat16 is native, it may by a rounding.
    """

    def __init__(self, weight: Tensor) -> None:
        self.dtype = arithmetic_dtype(weight.dtype, weight.device)
        self._multiply = _prepared(weight, self.dtype)

    def __call__(self, x: Tensor) -> Tensor:
        return self._multiply(x)


def _never_alone(multiply: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """A product that takes a single row as two: alone it would go another way, with other rounding."""
    return lambda x: multiply(x.expand(2, -1))[:1] if len(x) == 1 else multiply(x)


def _prepared(weight: Tensor, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """The product with this weight, for activations of `dtype`."""
    if weight.device.type == "cpu" and dtype == torch.float32:
        if (
            weight.dtype != dtype
            and "fbgemm" in torch.backends.quantized.supported_engines
            and _fits_half(weight)
        ):
            packed = torch.ops.quantized.linear_prepack_fp16(weight.float(), None)
            # the operator itself: torch's wrapper looks through the arguments for 10 µs a call
            multiply = torch.ops.quantized.linear_dynamic_fp16.default._op
            return lambda x: multiply(x, packed)
        if torch.backends.mkldnn.is_available():
            blocked = torch.ops.mkldnn._reorder_linear_weight(weight.float(), ROWS_HINT)
            return _never_alone(
                lambda x: torch.ops.mkldnn._linear_pointwise(x, blocked, None, "none", [], "")
            )
    held = weight.to(dtype)
    return _never_alone(lambda x: functional.linear(x, held))


def _fits_half(weight: Tensor) -> bool:
    """Whether every number is within float16; NaN is not, as packing would make a number of it."""
    return bool((weight.abs() <= torch.finfo(torch.float16).max).all())
