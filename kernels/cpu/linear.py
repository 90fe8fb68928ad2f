"""Linear layers: weights packed once, fused residual, SiLU and bias.

On a CPU oneDNN multiplies, from a weight that it has packed: in float32, and in bfloat16 where the CPU has
the instructions (AVX512-BF16, AMX). What follows a product elementwise (a residual, the activation, the gate)
is then done as the product is written: between two large products each operation of its own costs its
dispatch from a cold cache.

A CPU without bfloat16 arithmetic emulates such a product, slowly. There, weights of two bytes are held as
float16 and multiplied with float32 activations and sums by FBGEMM, which reads two bytes a weight and takes
hardly longer for eight rows than for one: that is what decodes K + 1 branches at the price of one. A bfloat16
weight of magnitude 7.6e-6 to 65,504 is the same number in float16; a smaller one moves by at most 3e-8, and a
tensor with a larger one is held in float32. Measurements: docs/findings/cpu-decoding.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from ..reference.matmul import Matmul

ROWS_HINT = {torch.bfloat16: 16, torch.float32: 256}
"""The row count that oneDNN's layout is chosen for: as good at one row as the layouts made for few rows."""


def get_compute_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The type of activations in a model stored as `dtype` on `device`."""
    if device.type != "cpu" or dtype == torch.float32:
        return dtype
    native_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return dtype if dtype == torch.bfloat16 and native_bf16 else torch.float32


def invariant_rows(num_rows: int) -> int:
    """The least number of rows, `num_rows` or more, at which a row's bits are those of any such number.

    On a CPU a row alone goes another way than several. FBGEMM cuts rows into pieces of up to six, and its
    kernels for AVX2 sum in another order where a piece has one or two: never if three divides their number.
    Large numbers are an eighth apart at most, since oneDNN keeps a program of its own for each that it meets.
    """
    step = 3 if torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2") else 1
    while num_rows > 16 * step:
        step *= 2
    return max(2, -(-num_rows // step) * step)


def pad_rows(rows: Sequence[int], device: torch.device) -> Sequence[int]:
    """On a CPU the last repeated until there are so many that none depends on the others' number."""
    if device.type != "cpu":
        return rows
    return [*rows, *([rows[-1]] * (invariant_rows(len(rows)) - len(rows)))]


class Linear:
    """A weight [out, in] and perhaps a bias [out]; maps activations [rows, in] to [rows, out].

    Both are of type `dtype`, which is what the machine is best at unless it is given: float32 keeps results
    unrounded. On a CPU a row's result does not depend, to the last bit, on what stands beside it, as long
    as there are `invariant_rows` of them. matmul: what multiplies; None for what is fastest.
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

    swiglu does it to [rows, 2 · out], gate first, where the products cannot take it along. matmul: see
    `Linear`.
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
    """torch's own product, and what the others are measured by."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        self._weight = weight.to(dtype)
        self._bias = None if bias is None else bias.to(dtype)

    def __call__(self, x: Tensor) -> Tensor:
        return functional.linear(x, self._weight, self._bias)

    def add_residual(self, residual: Tensor, x: Tensor) -> Tensor:
        return residual.add_(self(x))


class _GPULinear(_TorchLinear):
    """A GPU's, without a bias: it adds to what is there before it rounds, and in one launch."""

    def add_residual(self, residual: Tensor, x: Tensor) -> Tensor:
        return residual.addmm_(x, self._weight.t())


class _CustomLinear(_TorchLinear):
    """What the caller says."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype, matmul: Matmul) -> None:
        super().__init__(weight, bias, dtype)
        self._matmul = matmul

    def __call__(self, x: Tensor) -> Tensor:
        return self._matmul(x, self._weight, self._bias, None)


class _Fp16Linear(_TorchLinear):
    """FBGEMM: float16 weights, float32 activations and sums."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._packed = torch.ops.quantized.linear_prepack_fp16(
            weight.float(), None if bias is None else bias.float()
        )
        # the operator itself: torch's wrapper looks through the arguments for 10 µs a call
        self._op = torch.ops.quantized.linear_dynamic_fp16.default._op

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = self._op(x, self._packed)
        return y


class _OneDNNLinear(_TorchLinear):
    """oneDNN: a packed weight; elementwise work rides along."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        super().__init__(weight, bias, dtype)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(self._weight, ROWS_HINT[dtype])
        self._unary = torch.ops.mkldnn._linear_pointwise.default
        self._binary = torch.ops.mkldnn._linear_pointwise.binary

    def __call__(self, x: Tensor) -> Tensor:
        y: Tensor = self._unary(x, self._weight, self._bias, "none", [], "")
        return y

    def silu(self, x: Tensor) -> Tensor:
        """silu of the product."""
        y: Tensor = self._unary(x, self._weight, self._bias, "swish", [], "")
        return y

    def add_residual(self, residual: Tensor, x: Tensor) -> Tensor:
        y: Tensor = self._binary(x, residual, self._weight, self._bias, "add")
        return y

    def mul(self, factor: Tensor, x: Tensor) -> Tensor:
        """The product times the factor [rows, out]."""
        y: Tensor = self._binary(x, factor, self._weight, self._bias, "mul")
        return y


def _fuse_gated(gate: _OneDNNLinear, up: _OneDNNLinear) -> Callable[[Tensor], Tensor]:
    return lambda x: up.mul(gate.silu(x), x)


def _select_linear(
    weight: Tensor, bias: Tensor | None, dtype: torch.dtype, matmul: Matmul | None = None
) -> _TorchLinear:
    """The product with this weight for activations of `dtype`."""
    if matmul is not None:
        return _CustomLinear(weight, bias, dtype, matmul)
    if _uses_fbgemm_fp16(weight, dtype):
        return _Fp16Linear(weight, bias)
    if _uses_onednn(weight, dtype):
        return _OneDNNLinear(weight, bias, dtype)
    on_gpu = weight.device.type != "cpu"
    return _GPULinear(weight, bias, dtype) if on_gpu and bias is None else _TorchLinear(weight, bias, dtype)


def _uses_onednn(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether oneDNN is to multiply."""
    supported = weight.device.type == "cpu" and dtype in ROWS_HINT and torch.backends.mkldnn.is_available()
    return supported and not _uses_fbgemm_fp16(weight, dtype)


def _uses_fbgemm_fp16(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether FBGEMM is to multiply: each weight a float16. Packing makes a number of NaN."""
    if weight.device.type != "cpu" or not weight.dtype != dtype == torch.float32:
        return False
    min_weight, max_weight = weight.aminmax()
    fp16_max = torch.finfo(torch.float16).max
    return "fbgemm" in torch.backends.quantized.supported_engines and bool(
        -fp16_max <= min_weight and max_weight <= fp16_max
    )
