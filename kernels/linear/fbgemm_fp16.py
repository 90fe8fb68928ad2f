"""Weights of 16 bits on a CPU that computes in float32: float16, multiplied by FBGEMM.

A CPU without bfloat16 arithmetic emulates a bfloat16 product, slowly. FBGEMM reads two bytes per weight, with
float32 activations and sums, and is hardly slower for eight rows than for one, so K + 1 branches decode at
about the price of one. A bfloat16 weight of magnitude 7.6e-6 to 65,504 is exact in float16; a smaller one
changes by at most 3e-8, and a tensor with a larger one is stored in float32. Measurements:
docs/findings/cpu-decoding.md.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .format import GatedLayer, LinearLayer, WeightFormat
from .unquantized import TorchLinear, Unquantized

FP16_MAX = torch.finfo(torch.float16).max


def is_available() -> bool:
    """Whether this build of torch has FBGEMM."""
    return "fbgemm" in torch.backends.quantized.supported_engines


class FbgemmFp16(WeightFormat):
    """float16 weights, float32 activations; float32 for a tensor that float16 cannot hold."""

    compute_dtype = torch.float32
    bytes_per_weight = 2.0

    def __init__(self) -> None:
        self._fallback = Unquantized(torch.float32, torch.device("cpu"))

    def create(self, weight: Tensor, bias: Tensor | None) -> LinearLayer:
        return _Fp16Linear(weight, bias) if _fits_fp16(weight) else self._fallback.create(weight, bias)

    def create_gated(
        self,
        gate: Tensor,
        up: Tensor,
        biases: tuple[Tensor, Tensor] | None,
        swiglu: Callable[[Tensor], Tensor],
    ) -> GatedLayer:
        if _fits_fp16(gate) or _fits_fp16(up):
            return super().create_gated(gate, up, biases, swiglu)
        return self._fallback.create_gated(gate, up, biases, swiglu)


class _Fp16Linear(TorchLinear):
    """FBGEMM's product of float16 weights and float32 activations."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._packed = torch.ops.quantized.linear_prepack_fp16(
            weight.float(), None if bias is None else bias.float()
        )
        # call the operator directly: torch's wrapper takes 10 µs a call to check the arguments
        self._op = torch.ops.quantized.linear_dynamic_fp16.default._op

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = self._op(x, self._packed)
        return y


def _fits_fp16(weight: Tensor) -> bool:
    """Whether no weight exceeds float16 or is NaN, which packing makes a number."""
    min_weight, max_weight = weight.aminmax()
    return bool(min_weight >= -FP16_MAX and max_weight <= FP16_MAX)
