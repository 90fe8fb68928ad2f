"""With batch_invariant a row's bits are its own: beside any others, in any number, and however it was cut."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor
from trimtab.kernels.attention_params import CAUSAL, AttentionParams
from trimtab.kernels.reference import matmul as reference
from trimtab.kernels.reference import paged_attention as paged
from trimtab.kernels.reference.paged_attention import QueryTiles
from trimtab.kernels.reference.rotary import QKNorm, RotaryCosSin
from trimtab.kernels.steering.coefficients import SteeringCoefficients
from trimtab.kernels.steering.state import RequestLayout, RowSampling, SteeringState
from trimtab.kernels.steering.step import SamplerOutput
from trimtab.kernels.triton.attention import paged_attention
from trimtab.kernels.triton.batch_invariant_attention import invariant_attention
from trimtab.kernels.triton.batch_invariant_matmul import BLOCK_M, MatmulTile, matmul, matmul_kernel
from trimtab.kernels.triton.configs import AttentionConfig
from trimtab.kernels.triton.dot import UPCAST
from trimtab.kernels.triton.rms_norm import rms_norm
from trimtab.kernels.triton.rotary import rope_and_write_kv
from trimtab.kernels.triton.steering.step import invariant_steer, steer
from trimtab.kernels.triton.swiglu import swiglu

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
ULP = {F32: 2.0**-23, F16: 2.0**-10, BF16: 2.0**-7}
parametrize_dtypes = pytest.mark.parametrize("dtype", ULP, ids=str)

pytestmark = pytest.mark.usefixtures("poisoned_memory", "tensor_cores")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def random_tensor(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(shape).to(dtype).to(DEVICE)


@parametrize_dtypes
@pytest.mark.parametrize(("rows", "inner", "out"), [(1, 9, 7), (7, 41, 33), (9, 128, 130), (70, 70, 5)])
@pytest.mark.parametrize("biased", [False, True])
def test_a_matmul_is_near_its_float64_value(
    dtype: torch.dtype, rows: int, inner: int, out: int, biased: bool
) -> None:
    x, weight = random_tensor(rows, inner, dtype=dtype), random_tensor(out, inner, dtype=dtype)
    bias = random_tensor(out, dtype=dtype) if biased else None
    exact = reference.matmul(x.double(), weight.double(), None if bias is None else bias.double())
    for out_dtype in (None, F32):
        for one in (matmul(x, weight, bias, out_dtype), reference.matmul(x, weight, bias, out_dtype)):
            assert one.dtype == (out_dtype or dtype)
            # float32 sums of `inner` terms, then one rounding, which the interpreter makes a truncation
            allowed = 2 * ULP[F32] * inner**0.5 * (x.double().abs() @ weight.double().abs().T + 1)
            assert bool(((one.double() - exact).abs() <= allowed + ULP[one.dtype] * exact.abs()).all())


@parametrize_dtypes
def test_a_matmul_row_has_the_same_bits_for_any_number_of_rows(dtype: torch.dtype) -> None:
    shapes = ((2 * BLOCK_M + 5, 70), (41, 70), (41,))
    x, weight, bias = (random_tensor(*shape, dtype=dtype) for shape in shapes)
    together = matmul(x, weight, bias)
    for first, count in ((0, 1), (3, 1), (64, 1), (132, 1), (0, 2), (5, 17), (60, 9), (1, 128)):
        assert torch.equal(matmul(x[first : first + count], weight, bias), together[first : first + count])
    shuffled = torch.randperm(len(x), device=DEVICE)
    assert torch.equal(matmul(x[shuffled], weight, bias), together[shuffled])
    assert matmul(x[:0], weight, bias).shape == (0, 41)


@pytest.mark.skipif(not UPCAST, reason="compiled, a product of float32 sums in one order whatever its shape")
def test_other_tile_shapes_sum_in_another_order_so_that_the_test_above_can_fail() -> None:
    x, weight = random_tensor(BLOCK_M, 70), random_tensor(41, 70)
    narrow, wide = (torch.empty(BLOCK_M, 41, device=DEVICE) for _ in range(2))
    for found, columns in ((narrow, 32), (wide, 64)):
        matmul_kernel[(2, 2)](
            x, weight, weight, found, BLOCK_M, 41,
            K=70, HAS_BIAS=False, BLOCK_M=32, BLOCK_N=columns, BLOCK_K=columns, UPCAST=UPCAST,
        )  # fmt: skip
    assert torch.allclose(narrow, wide, atol=1e-4)
    assert not torch.equal(narrow, wide)


def test_the_tile_depends_on_the_weight_and_never_on_the_rows() -> None:
    assert [MatmulTile.from_weight_shape(out, BF16).block_n for out in (576, 4096, 6144, 28672, 128_256)] == [
        32,
        32,
        64,
        128,
        128,
    ]
    assert {MatmulTile.from_weight_shape(out, BF16).block_m for out in (1, 576, 4096, 6144, 28672)} == {
        BLOCK_M
    }


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((random_tensor(2, 3), random_tensor(4, 3, dtype=BF16)), "one floating type"),
        ((random_tensor(2, 3), random_tensor(4, 5)), "x must be"),
        ((random_tensor(2, 3), random_tensor(4, 3), random_tensor(5)), r"bias must be \[4\]"),
        ((random_tensor(2, 3), random_tensor(3, 4).T), "contiguous"),
    ],
)
def test_incompatible_shapes_and_dtypes_are_refused(inputs: tuple[Tensor, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        matmul(*inputs)


SHAPES: list[tuple[int, int, int, int, torch.dtype]] = [
    (4, 2, 16, 10, F32),
    (9, 3, 64, 64, F16),
    (3, 3, 16, 32, BF16),
    (20, 1, 16, 32, F32),
]
"""Heads, those of keys and values, a page, their width; the last has groups of more than a program's rows."""
LENGTH = 50
SMALL_SPLITS = AttentionConfig(split=32, keys=32)


def filled_cache(
    kv_heads: int, block: int, head_dim: int, dtype: torch.dtype, length: int
) -> tuple[Tensor, Tensor]:
    """A cache that holds one branch, in pages in no order, and beyond it NaN."""
    depth = -(-length // block)
    order = torch.randperm(depth + 3, device=DEVICE)
    cache = torch.full((2, len(order), kv_heads, block, head_dim), torch.nan, dtype=dtype, device=DEVICE)
    for block_index in range(depth):
        num_filled = min(block, length - block_index * block)
        cache[:, order[block_index], :, :num_filled] = random_tensor(
            2, kv_heads, num_filled, head_dim, dtype=dtype
        )
    return cache, order[:depth].to(torch.int32)[None]


def attend_in_chunks(
    queries: Tensor, cache: Tensor, table: Tensor, chunk_sizes: list[int], params: AttentionParams
) -> Tensor:
    """Of a branch whose tokens come in so many pieces, each over what stands before it and itself alone."""
    found, at = [], 0
    block, empty = cache.shape[3], torch.full_like(cache, torch.nan)
    for count in chunk_sizes:
        visible = empty.clone()
        for block_index in range(-(-(at + count) // block)):  # what comes later is not there yet
            block_id, num_visible = table[0, block_index], min(block, at + count - block_index * block)
            visible[:, block_id, :, :num_visible] = cache[:, block_id, :, :num_visible]
        tiles = QueryTiles.from_spans([(0, at, count, 0)], 1 if count == 1 else 16, DEVICE)
        found.append(
            invariant_attention(queries[at : at + count], visible, table, tiles, params, config=SMALL_SPLITS)
        )
        at += count
    return torch.cat(found)


ATTENTION_CASES = [
    *((shape, CAUSAL) for shape in SHAPES),
    *((SHAPES[0], AttentionParams(size)) for size in (1, 25, 45)),
    (SHAPES[2], AttentionParams(25)),
    (SHAPES[0], AttentionParams(25, softcap=0.8)),
    (SHAPES[1], AttentionParams(softcap=1.5)),
]


@pytest.mark.parametrize(("shape", "params"), ATTENTION_CASES, ids=str)
def test_attention_of_a_token_has_the_same_bits_in_any_chunk_and_decoded(
    shape: Any, params: AttentionParams
) -> None:
    heads, kv_heads, block, width, dtype = shape
    cache, table = filled_cache(kv_heads, block, width, dtype, LENGTH)
    queries = 2 * random_tensor(LENGTH, heads, width, dtype=dtype) * width**-0.5
    one_chunk = attend_in_chunks(queries, cache, table, [LENGTH], params)
    for cut in ([1, 2, 28, *[1] * 4, 15], [33, 1, 14, 1, 1], [17, 32, 1]):
        assert torch.equal(attend_in_chunks(queries, cache, table, cut, params), one_chunk)
    tiles = QueryTiles.from_spans([(0, 0, LENGTH, 0)], 16, DEVICE)
    exact = paged.paged_attention(queries.double(), cache.double(), table, tiles, params)
    allowed = 2e-6 + (ULP[dtype] * (exact.abs() + 1) if dtype != F32 else 0.0)
    assert bool(((one_chunk.double() - exact).abs() <= allowed).all())


def test_without_batch_invariance_prefill_and_decoding_differ_so_that_the_test_above_can_fail() -> None:
    heads, kv_heads, block, width, dtype = SHAPES[0]
    cache, table = filled_cache(kv_heads, block, width, dtype, LENGTH)
    queries = random_tensor(LENGTH, heads, width)
    runs = [(0, 0, LENGTH, 0)]
    one, other = (
        paged_attention(queries, cache, table, QueryTiles.from_spans(runs, size, DEVICE), config=SMALL_SPLITS)
        for size in (1, 16)
    )
    assert torch.allclose(one, other, atol=1e-5)
    assert not torch.equal(one, other)


def test_attention_of_a_token_has_the_same_bits_beside_longer_sequences() -> None:
    """More splits than its own, and other tiles."""
    heads, kv_heads, block, width, dtype = SHAPES[0]
    cache, table = filled_cache(kv_heads, block, width, dtype, LENGTH)
    queries = random_tensor(40, heads, width)
    runs = [(0, 20, 1, 0), (1, 49, 1, 0), (2, 31, 1, 0)]
    crowd = invariant_attention(
        queries, cache, table, QueryTiles.from_spans(runs, 1, DEVICE), config=SMALL_SPLITS
    )
    prompts = [(3, 30, 18, 0), (21, 2, 9, 0)]
    invariant_attention(
        queries, cache, table, QueryTiles.from_spans(prompts, 16, DEVICE), CAUSAL, crowd, config=SMALL_SPLITS
    )
    for first, start, count, _ in [*runs, *prompts]:
        alone = QueryTiles.from_spans([(first, start, count, 0)], 1 if count == 1 else 16, DEVICE)
        found = invariant_attention(queries, cache, table, alone, config=SMALL_SPLITS)
        assert torch.equal(found[first : first + count], crowd[first : first + count])


@parametrize_dtypes
def test_norms_rotary_and_swiglu_of_a_row_do_not_depend_on_other_rows(dtype: torch.dtype) -> None:
    x, weight = random_tensor(23, 66, dtype=dtype), random_tensor(66)
    eps, cos, sin = torch.tensor([1e-5], device=DEVICE), random_tensor(23, 22), random_tensor(23, 22)
    norm = QKNorm(random_tensor(2, 22), eps)

    def written(rows: slice) -> Tensor:
        """The turned queries, and what is written of keys and values, in pages of one token."""
        cache = torch.full((2, 23, 1, 1, 22), torch.nan, dtype=dtype, device=DEVICE)
        block_ids = torch.arange(23, device=DEVICE)[rows]
        turns, nowhere = RotaryCosSin(cos[rows], sin[rows], 1, 1, 0.2), torch.zeros_like(block_ids)
        queries = rope_and_write_kv(x[rows].view(-1, 3, 22), turns, norm, cache, block_ids, nowhere)
        return torch.cat((queries.flatten(1), cache[:, block_ids].movedim(0, 1).flatten(1)), 1)

    calls = (
        written,
        lambda rows: rms_norm(x[rows], weight, eps),
        lambda rows: swiglu(x[rows]),
    )
    for call in calls:
        together = call(slice(None))
        for first, count in ((0, 1), (7, 1), (22, 1), (3, 16), (6, 17)):
            rows = slice(first, first + count)
            assert torch.equal(call(rows), together[rows])


def test_steering_of_a_request_has_the_same_bits_whatever_the_others_use() -> None:
    """A trust region, rewards, a mask, filters and a delay, each beside plain requests."""
    vocab, draw = 97, RowSampling(temperature=0.8, top_k=20, top_p=0.9, min_p=0.01, seed=3)
    region = SteeringCoefficients(base_coef=-4.6, objective_coef=5.6, reward_rate=1.0, kl_budget=0.2)
    kinds = [
        (SteeringCoefficients(), 1, RowSampling()),
        (region, 3, draw),
        (SteeringCoefficients(base_coef=-2.0, objective_coef=3.0, mask_top_p=0.8), 2, draw),
    ]
    kinds += [
        (SteeringCoefficients(base_coef=-1.0, objective_coef=2.0, prev_contrast_coef=1.0), 2, RowSampling()),
        (SteeringCoefficients(), 1, RowSampling()),
    ]
    logits = 3 * random_tensor(sum(branches for _, branches, _ in kinds), vocab)
    table = SteeringState(vocab, DEVICE)
    for row, (program, branches, drawn) in enumerate(kinds):
        table.add_request(row, program, [1 / max(branches - 1, 1)] * (branches - 1), drawn)

    def steered(rows: list[int], how: Callable[..., SamplerOutput]) -> SamplerOutput:
        firsts = [sum(branches for _, branches, _ in kinds[:row]) for row in rows]
        row_logits = [logits[first : first + kinds[row][1]] for first, row in zip(firsts, rows, strict=True)]
        groups = RequestLayout.from_branches([(row, range(kinds[row][1])) for row in rows], DEVICE)
        return how(torch.cat(row_logits), groups, deepcopy(table), trace=True)

    crowd = steered([0, 1, 2, 3, 4], invariant_steer)
    first = 0
    for row, (_, branches, _) in enumerate(kinds):
        alone, usual = (steered([row], how) for how in (invariant_steer, steer))
        for name in ("tokens", "failed", "logprob", "strength", "kl"):
            found = getattr(crowd, name)[row : row + 1]
            assert torch.equal(found.nan_to_num(-7), getattr(alone, name).nan_to_num(-7))
            assert torch.allclose(found.double(), getattr(usual, name).double(), atol=1e-5, equal_nan=True)
        logprobs = crowd.branch_logprobs[first : first + branches]
        assert torch.equal(logprobs, alone.branch_logprobs)
        assert torch.allclose(logprobs, usual.branch_logprobs, atol=1e-5)
        first += branches
