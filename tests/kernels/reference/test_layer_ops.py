"""RMSNorm, RoPE and SwiGLU against float64; a row does not depend on other rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from trimtab.kernels.reference.rms_norm import rms_norm
from trimtab.kernels.reference.rotary import RotaryCosSin, apply_rotary
from trimtab.kernels.reference.swiglu import swiglu

SIZES = [7, 9, 41, 576, 1536]
EPS = torch.tensor([1e-5])
DTYPES = [torch.float32, torch.bfloat16]
EPS = torch.tensor([1e-5])


def seeded_randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_as_exact(got: Tensor, exact: Tensor, rough: Tensor) -> None:
    """The error against float64 is at most twice that of torch in the dtype of `got`, plus 1e-5."""
    assert got.dtype == rough.dtype
    assert got.shape == exact.shape
    allowed = 2 * (rough.double() - exact).abs().max() + 1e-5
    assert float((got.double() - exact).abs().max()) <= float(allowed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", SIZES)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e4])
def test_rms_norm_divides_by_the_root_mean_square(hidden: int, scale: float, dtype: torch.dtype) -> None:
    x, weight = (scale * seeded_randn(9, hidden)).to(dtype), 1 + seeded_randn(hidden, seed=1)
    wide = x.double()
    exact = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    rough = functional.rms_norm(x.float(), (hidden,), weight, 1e-5).to(dtype)
    assert_as_exact(rms_norm(x, weight, EPS), exact, rough)


def test_rms_norm_of_zeros_is_zero() -> None:
    assert rms_norm(torch.zeros(2, 9), torch.ones(9), EPS).tolist() == [[0.0] * 9] * 2


@pytest.mark.parametrize("hidden", SIZES)
def test_rms_norm_does_not_change_its_input(hidden: int) -> None:
    x = seeded_randn(3, hidden)
    before = x.clone()
    rms_norm(x, torch.ones(hidden), EPS)
    assert torch.equal(x, before)


def rotary_angles(head_dim: int, positions: Tensor) -> Tensor:
    """Angle of every pair at every position, [tokens, head_dim / 2] float64."""
    return positions.double()[:, None] * 10_000 ** (-torch.arange(0, head_dim, 2).double() / head_dim)


def cos_sin_table(
    head_dim: int, positions: Tensor, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """cos and sin for `apply_rotary`: for both halves, sin with the sign of its half."""
    angle = rotary_angles(head_dim, positions)
    cos, sin = torch.cat((angle.cos(), angle.cos()), -1), torch.cat((-angle.sin(), angle.sin()), -1)
    return cos[:, None].to(dtype), sin[:, None].to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [2, 6, 64, 82])
def test_rotary_rotates_each_pair_by_its_angle(head_dim: int, dtype: torch.dtype) -> None:
    positions = torch.tensor([0, 1, 2, 77, 2047, 8191, 5])
    x = seeded_randn(7, 3, head_dim).to(dtype)
    first, second = x.double().chunk(2, -1)
    turned = torch.complex(first, second) * torch.polar(
        torch.ones_like(first), rotary_angles(head_dim, positions)[:, None].expand_as(first)
    )
    cos, sin = cos_sin_table(head_dim, positions, dtype)
    half = head_dim // 2
    one, two = x[..., :half], x[..., half:]
    c, s = cos[..., :half], sin[..., half:]
    rough = torch.cat((one * c - two * s, two * c + one * s), -1)
    assert_as_exact(apply_rotary(x, cos, sin), torch.cat((turned.real, turned.imag), -1), rough)


def test_scores_of_rotated_queries_and_keys_depend_only_on_their_distance() -> None:
    query, key = seeded_randn(1, 1, 64, seed=1).double(), seeded_randn(1, 1, 64, seed=2).double()

    def score(at: int, to: int) -> float:
        turned = [
            apply_rotary(x, *cos_sin_table(64, torch.tensor([p]), torch.float64))
            for x, p in ((query, at), (key, to))
        ]
        return float((turned[0] * turned[1]).sum())

    assert score(1000, 993) == pytest.approx(score(7, 0), abs=1e-9)
    assert score(1000, 993) != pytest.approx(score(8, 0), abs=1e-3)


def test_one_rotary_pass_rotates_all_heads_scales_queries_and_leaves_values() -> None:
    (cos, sin), qkv = cos_sin_table(64, torch.arange(5)), seeded_randn(5, 3 + 2 * 2, 64)
    ready = apply_rotary(qkv, *RotaryCosSin(cos[:, 0], sin[:, 0], 3, 2, 0.125).per_head)
    assert torch.equal(
        ready[:, :3], 0.125 * apply_rotary(qkv[:, :3], cos, sin)
    )  # scaling by a power of two is exact
    assert torch.equal(ready[:, 3:5], apply_rotary(qkv[:, 3:5], cos, sin))
    assert torch.equal(ready[:, 5:], qkv[:, 5:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inner", SIZES)
def test_swiglu_gates_the_second_half_by_the_first(inner: int, dtype: torch.dtype) -> None:
    x = (4 * seeded_randn(9, 2 * inner)).to(dtype)
    gate, up = x.double()[:, :inner], x.double()[:, inner:]
    rough = x[:, :inner] * torch.sigmoid(x[:, :inner]) * x[:, inner:]
    assert_as_exact(swiglu(x), gate / (1 + (-gate).exp()) * up, rough)


def test_swiglu_is_exact_where_the_gate_is_far_from_zero() -> None:
    x = torch.tensor([[-200.0, 200.0, 0.0, 3.0, 3.0, 3.0]])
    assert swiglu(x).tolist() == [[0.0, 600.0, 0.0]]


@pytest.mark.parametrize("size", SIZES)
def test_a_row_has_the_same_bits_beside_any_number_of_rows(size: int) -> None:
    x, weight = seeded_randn(64, 2 * size), seeded_randn(2 * size, seed=1)
    norm, gated = rms_norm(x, weight, EPS), swiglu(x)
    for rows in (1, 2, 3, 7, 9, 41):
        for start in (0, 5):
            part = slice(start, start + rows)
            assert torch.equal(rms_norm(x[part], weight, EPS), norm[part])
            assert torch.equal(swiglu(x[part].contiguous()), gated[part])


def test_a_token_is_rotated_to_the_same_bits_beside_any_number_of_tokens() -> None:
    x = seeded_randn(41, 9, 64)
    cos, sin = cos_sin_table(64, torch.arange(41))
    together = apply_rotary(x, cos, sin)
    for token in (0, 1, 40):
        at = slice(token, token + 1)
        assert torch.equal(apply_rotary(x[at], cos[at], sin[at]), together[at])
