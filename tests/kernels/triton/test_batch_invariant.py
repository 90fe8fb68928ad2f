"""Batch-invariant kernels: the bits of a row do not depend on the batch or on how a prompt is chunked."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
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
from trimtab.kernels.steering.layout import RequestLayout
from trimtab.kernels.steering.sampling import RowSampling
from trimtab.kernels.steering.state import SteeringState
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
def test_a_matmul_is_close_to_float64(
    dtype: torch.dtype, rows: int, inner: int, out: int, biased: bool
) -> None:
    x, weight = random_tensor(rows, inner, dtype=dtype), random_tensor(out, inner, dtype=dtype)
    bias = random_tensor(out, dtype=dtype) if biased else None
    exact = reference.matmul(x.double(), weight.double(), None if bias is None else bias.double())
    for out_dtype in (None, F32):
        for one in (matmul(x, weight, bias, out_dtype), reference.matmul(x, weight, bias, out_dtype)):
            assert one.dtype == (out_dtype or dtype)
            # float32 sums of `inner` terms, then one rounding, which is a truncation in the interpreter
            allowed = 2 * ULP[F32] * inner**0.5 * (x.double().abs() @ weight.double().abs().T + 1)
            assert bool(((one.double() - exact).abs() <= allowed + ULP[one.dtype] * exact.abs()).all())


@parametrize_dtypes
def test_a_matmul_row_has_the_same_bits_for_any_number_of_rows(dtype: torch.dtype) -> None:
    shapes = ((2 * BLOCK_M + 5, 70), (41, 70), (41,))
    x, weight, bias = (random_tensor(*shape, dtype=dtype) for shape in shapes)
    batched = matmul(x, weight, bias)
    for first, count in ((0, 1), (3, 1), (64, 1), (132, 1), (0, 2), (5, 17), (60, 9), (1, 128)):
        assert torch.equal(matmul(x[first : first + count], weight, bias), batched[first : first + count])
    shuffled = torch.randperm(len(x), device=DEVICE)
    assert torch.equal(matmul(x[shuffled], weight, bias), batched[shuffled])
    assert matmul(x[:0], weight, bias).shape == (0, 41)


@pytest.mark.skipif(not UPCAST, reason="compiled float32 products sum in the same order for every shape")
def test_other_tile_shapes_change_bits_so_that_the_test_above_can_fail() -> None:
    x, weight = random_tensor(BLOCK_M, 70), random_tensor(41, 70)
    narrow, wide = (torch.empty(BLOCK_M, 41, device=DEVICE) for _ in range(2))
    for out, columns in ((narrow, 32), (wide, 64)):
        matmul_kernel[(2, 2)](
            x, weight, weight, out, BLOCK_M, 41,
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
        ((random_tensor(2, 3), random_tensor(4, 3, dtype=BF16)), "one floating dtype"),
        ((random_tensor(2, 3), random_tensor(4, 5)), "expected x"),
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
"""(heads, kv_heads, block_size, head_dim, dtype); the GQA group of the last exceeds the rows of a program."""
LENGTH = 50
SMALL_SPLITS = AttentionConfig(split=32, keys=32)


def filled_cache(
    kv_heads: int, block: int, head_dim: int, dtype: torch.dtype, length: int
) -> tuple[Tensor, Tensor]:
    """A cache with one branch in randomly ordered blocks, NaN elsewhere, and its block table."""
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
    """Attention of a branch whose tokens arrive in chunks; the cache is NaN beyond the current chunk."""
    outputs, pos = [], 0
    block, empty = cache.shape[3], torch.full_like(cache, torch.nan)
    for count in chunk_sizes:
        visible = empty.clone()
        for block_index in range(-(-(pos + count) // block)):  # later tokens are not in the cache yet
            block_id, num_visible = table[0, block_index], min(block, pos + count - block_index * block)
            visible[:, block_id, :, :num_visible] = cache[:, block_id, :, :num_visible]
        tiles = QueryTiles.from_spans([(0, pos, count, 0)], 1 if count == 1 else 16, DEVICE)
        outputs.append(
            invariant_attention(
                queries[pos : pos + count], visible, table, tiles, params, config=SMALL_SPLITS
            )
        )
        pos += count
    return torch.cat(outputs)


ATTENTION_CASES = [
    *((shape, CAUSAL) for shape in SHAPES),
    *((SHAPES[0], AttentionParams(size)) for size in (1, 25, 45)),
    (SHAPES[2], AttentionParams(25)),
    (SHAPES[0], AttentionParams(25, softcap=0.8)),
    (SHAPES[1], AttentionParams(softcap=1.5)),
]


@pytest.mark.parametrize(("shape", "params"), ATTENTION_CASES, ids=str)
def test_attention_of_a_token_has_the_same_bits_decoded_or_in_any_chunk(
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
    """With more splits than the token needs, and in other tiles."""
    heads, kv_heads, block, width, dtype = SHAPES[0]
    cache, table = filled_cache(kv_heads, block, width, dtype, LENGTH)
    queries = random_tensor(40, heads, width)
    runs = [(0, 20, 1, 0), (1, 49, 1, 0), (2, 31, 1, 0)]
    batched = invariant_attention(
        queries, cache, table, QueryTiles.from_spans(runs, 1, DEVICE), config=SMALL_SPLITS
    )
    prompts = [(3, 30, 18, 0), (21, 2, 9, 0)]
    invariant_attention(
        queries,
        cache,
        table,
        QueryTiles.from_spans(prompts, 16, DEVICE),
        CAUSAL,
        batched,
        config=SMALL_SPLITS,
    )
    for first, start, count, _ in [*runs, *prompts]:
        alone = QueryTiles.from_spans([(first, start, count, 0)], 1 if count == 1 else 16, DEVICE)
        single = invariant_attention(queries, cache, table, alone, config=SMALL_SPLITS)
        assert torch.equal(single[first : first + count], batched[first : first + count])


@parametrize_dtypes
def test_norms_rotary_and_swiglu_of_a_row_do_not_depend_on_other_rows(dtype: torch.dtype) -> None:
    x, weight = random_tensor(23, 66, dtype=dtype), random_tensor(66)
    eps, cos, sin = torch.tensor([1e-5], device=DEVICE), random_tensor(23, 22), random_tensor(23, 22)
    norm = QKNorm(random_tensor(2, 22), eps)

    def rotate_and_write(rows: slice) -> Tensor:
        """The rotated queries, and the keys and values written to blocks of one token."""
        cache = torch.full((2, 23, 1, 1, 22), torch.nan, dtype=dtype, device=DEVICE)
        block_ids = torch.arange(23, device=DEVICE)[rows]
        cos_sin, offsets = RotaryCosSin(cos[rows], sin[rows], 1, 1, 0.2), torch.zeros_like(block_ids)
        queries = rope_and_write_kv(x[rows].view(-1, 3, 22), cos_sin, norm, cache, block_ids, offsets)
        return torch.cat((queries.flatten(1), cache[:, block_ids].movedim(0, 1).flatten(1)), 1)

    calls = (
        rotate_and_write,
        lambda rows: rms_norm(x[rows], weight, eps),
        lambda rows: swiglu(x[rows]),
    )
    for call in calls:
        batched = call(slice(None))
        for first, count in ((0, 1), (7, 1), (22, 1), (3, 16), (6, 17)):
            rows = slice(first, first + count)
            assert torch.equal(call(rows), batched[rows])


def test_steering_of_a_request_has_the_same_bits_whatever_the_others_use() -> None:
    """A trust region, rewards, masks, filters and OPAD's contrast, batched with plain requests."""
    vocab, sampling = 97, RowSampling(temperature=0.8, top_k=20, top_p=0.9, min_p=0.01, seed=3)
    region = SteeringCoefficients(base_coef=-4.6, objective_coef=5.6, reward_rate=1.0, kl_budget=0.2)
    kinds = [
        (SteeringCoefficients(), 1, RowSampling()),
        (region, 3, sampling),
        (SteeringCoefficients(base_coef=-2.0, objective_coef=3.0, mask_top_p=0.8), 2, sampling),
    ]
    kinds += [
        (SteeringCoefficients(base_coef=-1.0, objective_coef=2.0, prev_contrast_coef=1.0), 2, RowSampling()),
        (SteeringCoefficients(), 1, RowSampling()),
        (replace(region, relative_top=0.05), 3, sampling),
    ]
    logits = 3 * random_tensor(sum(branches for _, branches, _ in kinds), vocab)
    state = SteeringState(vocab, DEVICE)
    for row, (coefficients, branches, row_sampling) in enumerate(kinds):
        state.add_request(row, coefficients, [1 / max(branches - 1, 1)] * (branches - 1), row_sampling)

    def steer_rows(rows: list[int], steer_fn: Callable[..., SamplerOutput]) -> SamplerOutput:
        firsts = [sum(branches for _, branches, _ in kinds[:row]) for row in rows]
        row_logits = [logits[first : first + kinds[row][1]] for first, row in zip(firsts, rows, strict=True)]
        layout = RequestLayout.from_branches([(row, range(kinds[row][1])) for row in rows], DEVICE)
        return steer_fn(torch.cat(row_logits), layout, deepcopy(state), trace=True)

    batched = steer_rows(list(range(len(kinds))), invariant_steer)
    first = 0
    for row, (_, branches, _) in enumerate(kinds):
        alone, default = (steer_rows([row], steer_fn) for steer_fn in (invariant_steer, steer))
        for name in ("tokens", "failed", "logprob", "strength", "kl"):
            actual = getattr(batched, name)[row : row + 1]
            assert torch.equal(actual.nan_to_num(-7), getattr(alone, name).nan_to_num(-7))
            assert torch.allclose(actual.double(), getattr(default, name).double(), atol=1e-5, equal_nan=True)
        logprobs = batched.branch_logprobs[first : first + branches]
        assert torch.equal(logprobs, alone.branch_logprobs)
        assert torch.allclose(logprobs, default.branch_logprobs, atol=1e-5)
        first += branches
