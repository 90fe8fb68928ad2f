"""Linear layers against float64; a row does not depend on other rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from trimtab.kernels.cpu.row_padding import invariant_rows
from trimtab.kernels.linear import fbgemm_fp16
from trimtab.kernels.linear.fbgemm_fp16 import FbgemmFp16
from trimtab.kernels.linear.format import LinearLayer, WeightFormat
from trimtab.kernels.linear.registry import select_format
from trimtab.kernels.linear.unquantized import Unquantized
from trimtab.kernels.reference.swiglu import swiglu

CPU = torch.device("cpu")
CPU_DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [
    (9, 7),
    (41, 9),
    (64, 41),
    (192, 576),
    (576, 3072),
    (1536, 576),
    (2048, 96),
    (4097, 41),
    (3072, 577),
]
ROWS = sorted({invariant_rows(rows) for rows in (*range(1, 65), 128, 254, 511)})
MAX_ROWS = ROWS[-1]


def random_weight(inner: int, outer: int, dtype: torch.dtype) -> Tensor:
    weight = torch.randn(outer, inner, generator=torch.Generator().manual_seed(inner))
    return (weight / inner**0.5).to(dtype)


def create(weight: Tensor, bias: Tensor | None = None) -> tuple[LinearLayer, torch.dtype]:
    """A layer in the format for this weight on a CPU, and the dtype of its activations."""
    weight_format = select_format(weight.dtype, CPU)
    return weight_format.create(weight, bias), weight_format.compute_dtype


def random_rows(rows: int, inner: int) -> Tensor:
    return torch.randn(rows, inner, generator=torch.Generator().manual_seed(rows))


@pytest.mark.parametrize("dtype", CPU_DTYPES)
@pytest.mark.parametrize(("inner", "outer"), SHAPES)
def test_a_row_has_the_same_bits_beside_any_number_of_rows(
    inner: int, outer: int, dtype: torch.dtype
) -> None:
    linear, compute_dtype = create(random_weight(inner, outer, dtype))
    x = random_rows(MAX_ROWS, inner).to(compute_dtype)
    together = linear(x)
    residual = random_rows(MAX_ROWS, outer).to(compute_dtype)
    added = linear.add_residual(residual.clone(), x)
    for rows in ROWS:
        for rows_slice in (slice(rows), slice(MAX_ROWS - rows, MAX_ROWS)):
            assert torch.equal(linear(x[rows_slice]), together[rows_slice]), rows
            assert torch.equal(
                linear.add_residual(residual[rows_slice].clone(), x[rows_slice]), added[rows_slice]
            ), rows


@pytest.mark.parametrize("dtype", CPU_DTYPES)
@pytest.mark.parametrize(("inner", "outer"), SHAPES)
def test_a_gated_row_has_the_same_bits_beside_any_number_of_rows(
    inner: int, outer: int, dtype: torch.dtype
) -> None:
    weights = (random_weight(inner, outer, dtype), random_weight(inner + 1, outer, dtype)[:, :inner])
    weight_format = select_format(dtype, CPU)
    gated = weight_format.create_gated(*weights, None, swiglu)
    x = random_rows(MAX_ROWS, inner).to(weight_format.compute_dtype)
    together = gated(x)
    for rows in ROWS:
        assert torch.equal(gated(x[:rows]), together[:rows]), rows


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", CPU_DTYPES)
@pytest.mark.parametrize("rows", [1, 7, 41])
def test_fused_operations_are_as_exact_as_separate_ones(rows: int, dtype: torch.dtype, biased: bool) -> None:
    inner, outer = 577, 41
    gate, up = random_weight(inner, outer, dtype), random_weight(inner, outer, dtype).roll(1, 0)
    biases = (gate[:, 0].clone(), up[:, 0].clone()) if biased else None
    linear, compute_dtype = create(gate, biases[0] if biases else None)
    gated = select_format(dtype, CPU).create_gated(gate, up, biases, swiglu)
    x, residual = random_rows(rows, inner).to(compute_dtype), random_rows(rows, outer).to(compute_dtype)

    def steps(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        first, second = biases or (None, None)
        g = functional.linear(x.to(dtype), gate.to(dtype), None if first is None else first.to(dtype))
        u = functional.linear(x.to(dtype), up.to(dtype), None if second is None else second.to(dtype))
        return residual.to(dtype) + g, functional.silu(g) * u

    exact, rough = steps(torch.float64), steps(compute_dtype)
    for got, true, near in zip(
        (linear.add_residual(residual.clone(), x), gated(x)), exact, rough, strict=True
    ):
        allowed = 2 * (near.double() - true).abs().max() + 1e-5
        assert float((got.double() - true).abs().max()) <= float(allowed)


def test_outputs_may_be_float32() -> None:
    weight, x = random_weight(576, 4097, torch.bfloat16), random_rows(7, 576)
    got = select_format(torch.bfloat16, CPU, compute_dtype=torch.float32).create(weight, None)(x)
    exact = x.double() @ weight.double().t()
    rough = functional.linear(x, weight.float()).double()
    assert got.dtype == torch.float32
    assert float((got.double() - exact).abs().max()) <= 2 * float((rough - exact).abs().max()) + 1e-5


@pytest.mark.parametrize("dtype", CPU_DTYPES)
@pytest.mark.parametrize(("inner", "outer"), SHAPES)
@pytest.mark.parametrize("rows", [1, 7, 41])
def test_a_linear_layer_is_as_exact_as_float32(inner: int, outer: int, rows: int, dtype: torch.dtype) -> None:
    """Against the original weights; float16 may change those under 7.6e-6 by 3e-8."""
    weight = random_weight(inner, outer, dtype)
    linear, compute_dtype = create(weight)
    x = random_rows(rows, inner).to(compute_dtype)
    exact = x.double() @ weight.double().t()
    rough = functional.linear(x, weight.to(compute_dtype))
    allowed = 2 * (rough.double() - exact).abs().max() + 3e-8 * x.double().abs().sum(-1).max() + 1e-5
    got = linear(x)
    assert got.shape == (rows, outer)
    assert float((got.double() - exact).abs().max()) <= float(allowed)


def test_a_row_is_not_affected_by_a_non_finite_neighbour() -> None:
    for dtype in CPU_DTYPES:
        linear, compute_dtype = create(random_weight(576, 96, dtype))
        x = random_rows(9, 576).to(compute_dtype)
        together = linear(x)
        for value in (torch.nan, torch.inf, 1e38):
            ill = x.clone()
            ill[4] = value
            got = linear(ill)
            assert torch.equal(got[:4], together[:4])
            assert torch.equal(got[5:], together[5:])


@pytest.mark.parametrize("size", [1e5, 1e30])
def test_a_weight_beyond_float16_keeps_its_value(size: float) -> None:
    weight = random_weight(41, 9, torch.bfloat16)
    weight[3, 5] = size
    linear, compute_dtype = create(weight)
    x = random_rows(7, 41).to(compute_dtype)
    exact = x.double() @ weight.double().t()
    rough = functional.linear(x, weight.to(compute_dtype)).double()
    # allow √n roundings of the sum's magnitude, for any summation order
    rounded = 41**0.5 * torch.finfo(torch.float32).eps * (x.double().abs() @ weight.double().abs().t())
    allowed = 2 * (rough - exact).abs().amax(0) + rounded + 1e-5
    assert bool(((linear(x).double() - exact).abs() <= allowed).all())


def test_a_nan_weight_gives_nan_outputs() -> None:
    weight = random_weight(41, 9, torch.bfloat16)
    weight[3, 5] = torch.nan
    linear, compute_dtype = create(weight)
    got = linear(random_rows(7, 41).to(compute_dtype))
    assert got.isnan().sum(0).tolist() == [7 * (out == 3) for out in range(9)]


@pytest.mark.parametrize("value", [1e-8, 6e-8, 5e-7, 7.6e-6])
def test_a_weight_too_small_for_float16_changes_by_at_most_3e_8(value: float) -> None:
    weight = torch.full((9, 41), value).to(torch.bfloat16)
    linear, compute_dtype = create(weight)
    got = linear(torch.eye(41).to(compute_dtype))
    assert float((got.double() - weight.double().t()).abs().max()) <= 3e-8


@pytest.mark.parametrize("size", [1.0, 1e30])
def test_gated_weights_beyond_float16_keep_their_values(size: float) -> None:
    gate, up = random_weight(41, 9, torch.bfloat16), random_weight(41, 9, torch.bfloat16).roll(1, 0)
    gate[3, 5] = size
    weight_format = select_format(torch.bfloat16, CPU, compute_dtype=torch.float32)
    got = weight_format.create_gated(gate, up, None, swiglu)(random_rows(7, 41))
    x = random_rows(7, 41)
    exact = functional.silu(x @ gate.float().t()) * (x @ up.float().t())
    assert torch.allclose(got, exact, rtol=1e-4, atol=1e-4)


def test_the_format_follows_dtype_device_and_matmul(monkeypatch: pytest.MonkeyPatch) -> None:
    def describe(weight_format: WeightFormat) -> tuple[str, torch.dtype, float]:
        return type(weight_format).__name__, weight_format.compute_dtype, weight_format.bytes_per_weight

    gpu, bf16, f32 = torch.device("cuda"), torch.bfloat16, torch.float32
    assert describe(select_format(f32, CPU)) == ("Unquantized", f32, 4)
    assert describe(select_format(bf16, gpu)) == ("Unquantized", bf16, 2)
    assert describe(select_format(bf16, CPU, compute_dtype=f32)) == ("FbgemmFp16", f32, 2)
    assert describe(select_format(bf16, gpu, compute_dtype=f32)) == ("Unquantized", f32, 4)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert isinstance(select_format(bf16, CPU), FbgemmFp16)
    assert isinstance(select_format(bf16, CPU, lambda x, w, b, d: x @ w.t()), Unquantized)
    monkeypatch.setattr(fbgemm_fp16, "is_available", lambda: False)
    assert describe(select_format(bf16, CPU)) == ("Unquantized", f32, 4), "stored as it is multiplied"
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert describe(select_format(bf16, CPU)) == ("Unquantized", bf16, 2)
    assert describe(select_format(torch.float16, CPU)) == ("Unquantized", f32, 4)
