"""Linear layers with packed weights and fused bias, residual add and SiLU.

On a CPU, oneDNN multiplies with a packed weight: in float32, and in bfloat16 where the CPU has the
instructions (AVX512-BF16, AMX). Elementwise operations after a matmul (residual, activation, gate) are fused
into it: between two large matmuls a separate operation is dispatched from a cold cache.

A CPU without bfloat16 arithmetic emulates a bfloat16 matmul, slowly. There, 16-bit weights are stored as
float16 and multiplied by FBGEMM with float32 activations and sums. FBGEMM reads two bytes per weight and is
hardly slower for eight rows than for one, so K + 1 branches decode at about the price of one. A bfloat16
weight of magnitude 7.6e-6 to 65,504 is exact in float16; a smaller one changes by at most 3e-8, and a tensor
with a larger one is stored in float32. Measurements: docs/findings/cpu-decoding.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ..reference.matmul import Matmul

ROWS_HINT = {torch.bfloat16: 16, torch.float32: 256}
"""Row count that oneDNN chooses the weight layout for; at one row as fast as a layout for few rows."""


def get_compute_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of activations in a model stored as `dtype` on `device`."""
    if device.type != "cpu" or dtype == torch.float32:
        return dtype
    native_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return dtype if dtype == torch.bfloat16 and native_bf16 else torch.float32


def invariant_rows(num_rows: int) -> int:
    """Round `num_rows` up to a row count at which a row's bits do not depend on the row count.

    A CPU computes a single row differently from several. FBGEMM splits rows into tiles of up to six, and its
    AVX2 kernels sum in a different order in a tile of one or two, which a multiple of three never has. Large
    row counts are at most an eighth apart, since oneDNN caches a compiled kernel per row count.
    """
    step = 3 if torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2") else 1
    while num_rows > 16 * step:
        step *= 2
    return max(2, -(-num_rows // step) * step)


def pad_rows(rows: Sequence[int], device: torch.device) -> Sequence[int]:
    """On a CPU, repeat the last row up to `invariant_rows`; elsewhere return the rows unchanged."""
    if device.type != "cpu":
        return rows
    return [*rows, *([rows[-1]] * (invariant_rows(len(rows)) - len(rows)))]


class Linear:
    """A linear layer: weight [out, in], optional bias [out]; maps activations [rows, in] to [rows, out].

    Activations and results are in `dtype`, by default the fastest on the device; float32 leaves results
    unrounded. On a CPU with `invariant_rows` rows, a row's bits do not depend on the other rows. matmul:
    custom implementation of the product; None for the fastest.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        dtype: torch.dtype | None = None,
        matmul: Matmul | None = None,
    ) -> None:
        self.dtype = dtype or get_compute_dtype(weight.dtype, weight.device)
        self._impl = _select_linear(weight, bias, self.dtype, matmul)

    def __call__(self, x: Tensor) -> Tensor:
        return self._impl(x)

    def add_residual(self, residual: Tensor, x: Tensor) -> Tensor:
        """residual + x Wᵀ + b, all [rows, out]; may reuse the residual's memory."""
        return self._impl.add_residual(residual, x)


class GatedLinear:
    """silu(x Gᵀ + g) · (x Uᵀ + u), the first half of a gated feed-forward: [rows, in] → [rows, out].

    swiglu: activation of [rows, 2 · out], gate first, used where it cannot be fused into the matmuls.
    matmul: see `Linear`.
    """

    def __init__(
        self,
        gate: Tensor,
        up: Tensor,
        biases: tuple[Tensor, Tensor] | None,
        swiglu: Callable[[Tensor], Tensor],
        matmul: Matmul | None = None,
    ) -> None:
        dtype = get_compute_dtype(gate.dtype, gate.device)
        gate_bias, up_bias = biases or (None, None)
        if matmul is None and _uses_onednn(gate, dtype) and _uses_onednn(up, dtype):
            self._apply = _fuse_gated(
                _OneDNNLinear(gate, gate_bias, dtype), _OneDNNLinear(up, up_bias, dtype)
            )
        else:
            bias = None if biases is None else torch.cat(biases)
            gate_up = Linear(torch.cat((gate, up)), bias, matmul=matmul)
            self._apply = lambda x: swiglu(gate_up(x))

    def __call__(self, x: Tensor) -> Tensor:
        return self._apply(x)


class _TorchLinear:
    """torch's linear; the baseline of the other implementations."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        self._weight = weight.to(dtype)
        self._bias = None if bias is None else bias.to(dtype)

    def __call__(self, x: Tensor) -> Tensor:
        return functional.linear(x, self._weight, self._bias)

    def add_residual(self, residual: Tensor, x: Tensor) -> Tensor:
        return residual.add_(self(x))


class _GPULinear(_TorchLinear):
    """Linear on a GPU without bias: adds the residual in the matmul, before rounding and in one launch."""

    def add_residual(self, residual: Tensor, x: Tensor) -> Tensor:
        return residual.addmm_(x, self._weight.t())


class _CustomLinear(_TorchLinear):
    """A linear layer with the caller's matmul."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, matmul: Matmul) -> None:
        super().__init__(weight, bias, dtype)
        self._matmul = matmul

    def __call__(self, x: Tensor) -> Tensor:
        return self._matmul(x, self._weight, self._bias, None)


class _Fp16Linear(_TorchLinear):
    """FBGEMM linear: float16 weights, float32 activations and sums."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._packed = torch.ops.quantized.linear_prepack_fp16(
            weight.float(), None if bias is None else bias.float()
        )
        # call the operator directly: torch's wrapper takes 10 µs a call to check the arguments
        self._op = torch.ops.quantized.linear_dynamic_fp16.default._op

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = self._op(x, self._packed)
        return y


class _OneDNNLinear(_TorchLinear):
    """oneDNN linear: packed weight, fused elementwise operations."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__(weight, bias, dtype)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(self._weight, ROWS_HINT[dtype])
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


def _fuse_gated(gate: _OneDNNLinear, up: _OneDNNLinear) -> Callable[[Tensor], Tensor]:
    return lambda x: up.mul(gate.silu(x), x)


def _select_linear(
    weight: Tensor, bias: Tensor | None, dtype: torch.dtype, matmul: Matmul | None = None
) -> _TorchLinear:
    """Choose the implementation for this weight and activations of `dtype`."""
    if matmul is not None:
        return _CustomLinear(weight, bias, dtype, matmul)
    if _uses_fbgemm_fp16(weight, dtype):
        return _Fp16Linear(weight, bias)
    if _uses_onednn(weight, dtype):
        return _OneDNNLinear(weight, bias, dtype)
    on_gpu = weight.device.type != "cpu"
    return _GPULinear(weight, bias, dtype) if on_gpu and bias is None else _TorchLinear(weight, bias, dtype)


def _uses_onednn(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether to multiply with oneDNN."""
    supported = weight.device.type == "cpu" and dtype in ROWS_HINT and torch.backends.mkldnn.is_available()
    return supported and not _uses_fbgemm_fp16(weight, dtype)


def _uses_fbgemm_fp16(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether to multiply with FBGEMM: no weight exceeds float16 or is NaN, which packing makes a number."""
    if weight.device.type != "cpu" or not weight.dtype != dtype == torch.float32:
        return False
    min_weight, max_weight = weight.aminmax()
    fp16_max = torch.finfo(torch.float16).max
    return "fbgemm" in torch.backends.quantized.supported_engines and bool(
        -fp16_max <= min_weight and max_weight <= fp16_max
    )
