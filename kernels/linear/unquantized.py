"""Weights in the dtype of the activations: float32, bfloat16 or float16.

On a CPU, oneDNN multiplies with a packed weight: in float32, and in bfloat16 where the CPU has the
instructions (AVX512-BF16, AMX). Elementwise operations after a matmul (residual, activation, gate) are fused
into it: between two large matmuls a separate operation is dispatched from a cold cache.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from ..reference.matmul import Matmul
from .format import GatedLayer, LinearLayer, WeightFormat

ROWS_HINT = {torch.bfloat16: 16, torch.float32: 256}
"""Row count that oneDNN chooses the weight layout for; at one row as fast as a layout for few rows."""


class Unquantized(WeightFormat):
    """Weights stored in `dtype` on `device`. matmul: custom implementation of the product."""

    def __init__(self, dtype: torch.dtype, device: torch.device, matmul: Matmul | None = None) -> None:
        self.compute_dtype, self.bytes_per_weight = dtype, float(dtype.itemsize)
        self._on_cpu, self._matmul = device.type == "cpu", matmul
        has_onednn = self._on_cpu and dtype in ROWS_HINT and torch.backends.mkldnn.is_available()
        self._uses_onednn = has_onednn and matmul is None

    def create(self, weight: Tensor, bias: Tensor | None) -> LinearLayer:
        weight, bias = weight.to(self.compute_dtype), None if bias is None else bias.to(self.compute_dtype)
        if self._matmul is not None:
            return _CustomLinear(weight, bias, self._matmul)
        if self._uses_onednn:
            return _OneDNNLinear(weight, bias)
        return TorchLinear(weight, bias) if self._on_cpu or bias is not None else _GPULinear(weight, bias)

    def create_gated(
        self,
        gate: Tensor,
        up: Tensor,
        biases: tuple[Tensor, Tensor] | None,
        swiglu: Callable[[Tensor], Tensor],
    ) -> GatedLayer:
        if not self._uses_onednn:
            return super().create_gated(gate, up, biases, swiglu)
        gate_bias, up_bias = biases or (None, None)
        gate_layer, up_layer = self.create(gate, gate_bias), self.create(up, up_bias)
        assert isinstance(gate_layer, _OneDNNLinear)
        assert isinstance(up_layer, _OneDNNLinear)
        return _fuse_gated(gate_layer, up_layer)


class TorchLinear:
    """torch's linear; the baseline of the other implementations."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._weight, self._bias = weight, bias

    def __call__(self, x: Tensor) -> Tensor:
        return functional.linear(x, self._weight, self._bias)

    def add_residual(self, residual: Tensor, x: Tensor) -> Tensor:
        return residual.add_(self(x))


class _GPULinear(TorchLinear):
    """Linear on a GPU without bias: adds the residual in the matmul, before rounding and in one launch."""

    def add_residual(self, residual: Tensor, x: Tensor) -> Tensor:
        return residual.addmm_(x, self._weight.t())


class _CustomLinear(TorchLinear):
    """A linear layer with the caller's matmul."""

    def __init__(self, weight: Tensor, bias: Tensor | None, matmul: Matmul) -> None:
        super().__init__(weight, bias)
        self._matmul = matmul

    def __call__(self, x: Tensor) -> Tensor:
        return self._matmul(x, self._weight, self._bias, None)


class _OneDNNLinear(TorchLinear):
    """oneDNN linear: packed weight, fused elementwise operations."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight, ROWS_HINT[weight.dtype])
        super().__init__(packed, bias)
        self._unary = torch.ops.mkldnn._linear_pointwise.default
        self._binary = torch.ops.mkldnn._linear_pointwise.binary

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = self._unary(x, self._weight, self._bias, "none", [], "")
        return y

    def silu(self, x: Tensor) -> Tensor:
        """silu(x Wᵀ + b)."""
        y: Tensor = self._unary(x, self._weight, self._bias, "swish", [], "")
        return y

    def add_residual(self, residual: Tensor, x: Tensor) -> Tensor:
        y: Tensor = self._binary(x, residual, self._weight, self._bias, "add")
        return y

    def mul(self, factor: Tensor, x: Tensor) -> Tensor:
        """(x Wᵀ + b) · factor, factor [rows, out]."""
        y: Tensor = self._binary(x, factor, self._weight, self._bias, "mul")
        return y


def _fuse_gated(gate: _OneDNNLinear, up: _OneDNNLinear) -> GatedLayer:
    return lambda x: up.mul(gate.silu(x), x)
