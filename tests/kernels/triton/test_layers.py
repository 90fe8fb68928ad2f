"""RMSNorm, SwiGLU, RoPE and attention kernels against float64, with poisoned memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from trimtab.kernels.attention_params import AttentionParams
from trimtab.kernels.reference import paged_attention as paged
from trimtab.kernels.reference import rms_norm as norm
from trimtab.kernels.reference import rotary, swiglu
from trimtab.kernels.reference.paged_attention import QueryTiles
from trimtab.kernels.triton.attention import paged_attention
from trimtab.kernels.triton.configs import AttentionConfig
from trimtab.kernels.triton.rms_norm import MAX_HIDDEN_SIZE, rms_norm
from trimtab.kernels.triton.rotary import rope_and_write_kv
from trimtab.kernels.triton.swiglu import swiglu as launch_swiglu

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
ULP = {torch.float32: 2.0**-23, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
parametrize_dtypes = pytest.mark.parametrize("dtype", ULP, ids=str)


pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def random_tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(dtype).to(DEVICE)


def assert_near(actual: Tensor, exact: Tensor, sums: int = 1) -> None:
    """Assert an error of a few roundings of the result dtype and of float32 sums with `sums` terms."""
    assert actual.isfinite().all()
    size = exact.abs().clamp(min=exact.abs().mean())
    error = ((actual.double() - exact) / size).abs().max()
    assert float(error) <= 3 * ULP[actual.dtype] + 4 * sums**0.5 * ULP[torch.float32]


@parametrize_dtypes
@pytest.mark.parametrize("hidden", [1, 33, 576])
def test_rms_norm_is_close_to_float64(dtype: torch.dtype, hidden: int) -> None:
    x, weight, eps = (
        random_tensor(3, hidden, dtype=dtype),
        random_tensor(hidden),
        torch.tensor([1e-5], device=DEVICE),
    )
    for actual in (rms_norm(x, weight, eps), norm.rms_norm(x, weight, eps)):
        assert actual.dtype == dtype
        assert_near(actual, x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight)
    with pytest.raises(ValueError, match="at most"):
        rms_norm(random_tensor(1, MAX_HIDDEN_SIZE + 1), random_tensor(MAX_HIDDEN_SIZE + 1), eps)


@parametrize_dtypes
def test_swiglu_is_close_to_float64(dtype: torch.dtype) -> None:
    gate_up = 4 * random_tensor(3, 2 * 1050, dtype=dtype)
    gate, up = gate_up.double().chunk(2, dim=-1)
    assert_near(launch_swiglu(gate_up), torch.nn.functional.silu(gate) * up)
    assert_near(swiglu.swiglu(gate_up), torch.nn.functional.silu(gate) * up)


@parametrize_dtypes
@pytest.mark.parametrize("normed", [False, True])
@pytest.mark.parametrize("width", [2, 10, 64])
def test_rotary_and_cache_write_are_close_to_float64(dtype: torch.dtype, normed: bool, width: int) -> None:
    """The last row is padding: it is rotated, but not written to the cache."""
    rows, tokens, heads, kv_heads, block = 6, 5, 6, 2, 16
    qkv = random_tensor(rows, heads + 2 * kv_heads, width, dtype=dtype)
    cos_sin = random_rotary(rows, heads, kv_heads, width)
    weight, eps = random_tensor(heads + kv_heads, width), torch.tensor([1e-6], device=DEVICE)
    norm = rotary.QKNorm(weight, eps) if normed else None
    block_ids, offset = (
        torch.tensor([3, 0, 3, 6, 1], device=DEVICE),
        torch.tensor([0, 15, 1, 7, 7], device=DEVICE),
    )
    empty = torch.full((2, 7, kv_heads, block, width), torch.nan, dtype=dtype, device=DEVICE)
    caches = empty, empty.clone()
    actual = rope_and_write_kv(qkv, cos_sin, norm, caches[0], block_ids, offset)
    assert_near(rotary.rope_and_write_kv(qkv, cos_sin, norm, caches[1], block_ids, offset), actual.double())
    exact = _float64_rotary(qkv.double(), cos_sin, norm)
    assert_near(actual, exact[:, :heads] * cos_sin.q_scale)
    is_written = torch.zeros(7, block, dtype=torch.bool, device=DEVICE)
    is_written[block_ids, offset] = True
    for side, first in ((0, heads), (1, heads + kv_heads)):
        for cache in caches:
            assert_near(cache[side, block_ids, :, offset], exact[:tokens, first : first + kv_heads])
            assert cache[side].movedim(1, 2)[~is_written].isnan().all()


def test_cache_write_rounds_to_the_dtype_of_the_cache() -> None:
    qkv, cos_sin = random_tensor(2, 5, 64), random_rotary(2, 3, 1, 64)
    block_ids = offset = torch.tensor([0, 1], device=DEVICE)
    caches = [torch.empty(2, 2, 1, 16, 64, dtype=torch.float16, device=DEVICE) for _ in range(2)]
    actual, expected = (
        write(qkv, cos_sin, None, cache, block_ids, offset)
        for write, cache in zip((rope_and_write_kv, rotary.rope_and_write_kv), caches, strict=True)
    )
    assert actual.dtype == expected.dtype == torch.float16
    assert_near(actual, expected.double())
    assert_near(caches[0][:, block_ids, :, offset], caches[1][:, block_ids, :, offset].double())


def random_rotary(rows: int, heads: int, kv_heads: int, head_dim: int) -> rotary.RotaryCosSin:
    angles = torch.arange(rows, device=DEVICE)[:, None] * torch.rand(head_dim // 2).to(DEVICE).repeat(2)
    sign = torch.tensor([-1.0, 1.0], device=DEVICE).repeat_interleave(head_dim // 2)
    return rotary.RotaryCosSin(angles.cos(), angles.sin() * sign, heads, kv_heads, head_dim**-0.5)


def _float64_rotary(qkv: Tensor, cos_sin: rotary.RotaryCosSin, norm: rotary.QKNorm | None) -> Tensor:
    rotated, cos, sin = qkv[:, : -cos_sin.num_kv_heads], cos_sin.cos.double(), cos_sin.sin.double()
    if norm is not None:
        length = (rotated.square().mean(-1, keepdim=True) + norm.eps.double()).rsqrt()
        rotated = rotated * length * norm.weight.double()
    rotated = rotated * cos[:, None] + rotated.roll(qkv.shape[-1] // 2, -1) * sin[:, None]
    return torch.cat((rotated, qkv[:, -cos_sin.num_kv_heads :]), 1)


SEQUENCES = {
    "decoding": [(0, 0, 1), (1, 63, 1), (2, 64, 1), (3, 255, 1), (4, 256, 1), (5, 517, 1), (6, 30, 1)],
    "prompts": [(0, 0, 1), (1, 0, 70), (71, 33, 5), (76, 250, 21), (97, 64, 16)],
}


def filled_cache(
    kv_heads: int, block: int, head_dim: int, dtype: torch.dtype, runs: list[Any]
) -> tuple[Tensor, Tensor]:
    """A cache with the runs in randomly ordered blocks, NaN elsewhere, and their block tables."""
    depth = max(-(-(start + count) // block) for _, start, count in runs)
    order = torch.randperm(len(runs) * depth + 3, device=DEVICE)
    cache = torch.full((2, len(order), kv_heads, block, head_dim), torch.nan, dtype=dtype, device=DEVICE)
    tables = torch.full((len(runs), depth), 1 << 30, dtype=torch.int32, device=DEVICE)
    for index, (_, start, count) in enumerate(runs):
        for block_index in range(-(-(start + count) // block)):
            block_id = int(order[index * depth + block_index])
            tables[index, block_index] = block_id
            num_filled = min(block, start + count - block_index * block)
            cache[:, block_id, :, :num_filled] = random_tensor(2, kv_heads, num_filled, head_dim, dtype=dtype)
    return cache, tables


def make_tiles(runs: list[Any], size: int) -> QueryTiles:
    return QueryTiles.from_spans([(*run, index) for index, run in enumerate(runs)], size, DEVICE)


SMALL, DEMO, SINGLE = (
    (4, 2, 16, 10, torch.float32),
    (9, 3, 64, 64, torch.float16),
    (3, 3, 16, 32, torch.bfloat16),
)
PARAMS = [
    *((shape, AttentionParams(window)) for shape in (SMALL, DEMO, SINGLE) for window in (None, 40)),
    (SMALL, AttentionParams(1)),
    (SMALL, AttentionParams(300)),
    (SMALL, AttentionParams(softcap=1.5)),
    (DEMO, AttentionParams(40, softcap=0.7)),
    (SINGLE, AttentionParams(softcap=30.0)),
]


@pytest.mark.parametrize(("shape", "params"), PARAMS, ids=str)
@pytest.mark.parametrize("kind", SEQUENCES)
def test_attention_is_close_to_float64(
    kind: str, shape: tuple[int, int, int, int, torch.dtype], params: AttentionParams
) -> None:
    heads, kv_heads, block, width, dtype = shape
    runs = SEQUENCES[kind]
    cache, tables = filled_cache(kv_heads, block, width, dtype, runs)
    rows = max(first + count for first, _, count in runs)
    queries = 2 * random_tensor(rows, heads, width, dtype=dtype) * width**-0.5
    tiles = QueryTiles.from_spans(
        [(*run, index) for index, run in enumerate(runs)], 1 if kind == "decoding" else 16, DEVICE
    )
    actual = paged_attention(queries, cache, tables, tiles, params)
    exact = paged.paged_attention(queries.double(), cache.double(), tables, tiles, params)
    assert actual.shape == exact.shape
    assert actual.isfinite().all()
    # the result is rounded, and on a GPU also the probabilities before the product with V
    allowed = 2e-6 + (ULP[dtype] * (exact.abs() + 1) if dtype != torch.float32 else 0.0)
    assert bool(((actual.double() - exact).abs() <= allowed).all())


@pytest.mark.parametrize("kind", SEQUENCES)
@pytest.mark.parametrize("tuned", [AttentionConfig(128, 32, 2, 4, 3), AttentionConfig(512, 128, 8, 8, 1)])
def test_attention_matches_the_reference_with_any_launch_config(kind: str, tuned: AttentionConfig) -> None:
    heads, kv_heads, block, width, dtype = DEMO
    runs = SEQUENCES[kind]
    cache, tables = filled_cache(kv_heads, block, width, dtype, runs)
    rows = max(first + count for first, _, count in runs)
    queries = 2 * random_tensor(rows, heads, width, dtype=dtype) * width**-0.5
    tiles = make_tiles(runs, 1 if kind == "decoding" else 16)
    actual = paged_attention(queries, cache, tables, tiles, AttentionParams(300), config=tuned)
    exact = paged.paged_attention(queries.double(), cache.double(), tables, tiles, AttentionParams(300))
    assert bool(((actual.double() - exact).abs() <= 2e-6 + ULP[dtype] * (exact.abs() + 1)).all())


def test_attention_of_a_token_has_the_same_bits_alone_and_batched() -> None:
    runs = SEQUENCES["decoding"]
    cache, tables = filled_cache(2, 16, 32, torch.float32, runs)
    queries = random_tensor(len(runs), 6, 32)
    batched = paged_attention(queries, cache, tables, make_tiles(runs, 1))
    for index in (1, 5):
        _, start, count = runs[index]
        tiles = QueryTiles.from_spans([(0, start, count, index)], 1, DEVICE)
        assert torch.equal(
            paged_attention(queries[index : index + 1], cache, tables, tiles)[0], batched[index]
        )
