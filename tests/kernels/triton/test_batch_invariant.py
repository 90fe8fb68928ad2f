"""With batch_invariant a row's bits are its own: beside any others, in any number, and however it was cut."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor
from trimtab.kernels.reference import matmul as reference
from trimtab.kernels.reference import paged_attention as paged
from trimtab.kernels.reference.paged_attention import Tiles
from trimtab.kernels.reference.rotary import HeadNorm, Turns
from trimtab.kernels.steering.coefficients import Program
from trimtab.kernels.steering.state import Draw, Groups, SteerTable
from trimtab.kernels.steering.step import Choice
from trimtab.kernels.triton.attention import paged_attention
from trimtab.kernels.triton.batch_invariant_attention import invariant_attention
from trimtab.kernels.triton.batch_invariant_matmul import ROWS, Tile, matmul, matmul_kernel
from trimtab.kernels.triton.configs import Attention
from trimtab.kernels.triton.dot import UPCAST
from trimtab.kernels.triton.rms_norm import rms_norm
from trimtab.kernels.triton.rotary import rope_write
from trimtab.kernels.triton.steering.step import invariant_steer, steer
from trimtab.kernels.triton.swiglu import swiglu

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
ULP = {F32: 2.0**-23, F16: 2.0**-10, BF16: 2.0**-7}
types = pytest.mark.parametrize("dtype", ULP, ids=str)

pytestmark = pytest.mark.usefixtures("poisoned_memory", "tensor_cores")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def random(*shape: int, dtype: torch.dtype = F32) -> Tensor:
    return torch.randn(shape).to(dtype).to(DEVICE)


@types
@pytest.mark.parametrize(("rows", "inner", "out"), [(1, 9, 7), (7, 41, 33), (9, 128, 130), (70, 70, 5)])
@pytest.mark.parametrize("biased", [False, True])
def test_a_product_is_that_of_float64(
    dtype: torch.dtype, rows: int, inner: int, out: int, biased: bool
) -> None:
    x, weight = random(rows, inner, dtype=dtype), random(out, inner, dtype=dtype)
    bias = random(out, dtype=dtype) if biased else None
    exact = reference.matmul(x.double(), weight.double(), None if bias is None else bias.double())
    for asked in (None, F32):
        for one in (matmul(x, weight, bias, asked), reference.matmul(x, weight, bias, asked)):
            assert one.dtype == (asked or dtype)
            # float32 sums of `inner` terms, then one rounding, which the interpreter makes a truncation
            allowed = 2 * ULP[F32] * inner**0.5 * (x.double().abs() @ weight.double().abs().T + 1)
            assert bool(((one.double() - exact).abs() <= allowed + ULP[one.dtype] * exact.abs()).all())


@types
def test_a_row_of_a_product_is_its_own_whatever_the_number_of_rows(dtype: torch.dtype) -> None:
    shapes = ((2 * ROWS + 5, 70), (41, 70), (41,))
    x, weight, bias = (random(*shape, dtype=dtype) for shape in shapes)
    together = matmul(x, weight, bias)
    for first, count in ((0, 1), (3, 1), (64, 1), (132, 1), (0, 2), (5, 17), (60, 9), (1, 128)):
        assert torch.equal(matmul(x[first : first + count], weight, bias), together[first : first + count])
    shuffled = torch.randperm(len(x), device=DEVICE)
    assert torch.equal(matmul(x[shuffled], weight, bias), together[shuffled])
    assert matmul(x[:0], weight, bias).shape == (0, 41)


@pytest.mark.skipif(not UPCAST, reason="compiled, a product of float32 sums in one order whatever its shape")
def test_products_of_another_shape_sum_in_another_order_so_that_the_test_above_can_fail() -> None:
    x, weight = random(ROWS, 70), random(41, 70)
    narrow, wide = (torch.empty(ROWS, 41, device=DEVICE) for _ in range(2))
    for found, columns in ((narrow, 32), (wide, 64)):
        matmul_kernel[(2, 2)](
            x, weight, weight, found, ROWS, 41,
            INNER=70, BIASED=False, ROWS=32, COLUMNS=columns, DEPTH=columns, UPCAST=UPCAST,
        )  # fmt: skip
    assert torch.allclose(narrow, wide, atol=1e-4)
    assert not torch.equal(narrow, wide)


def test_a_tile_follows_the_weight_and_never_the_rows() -> None:
    assert [Tile.of(out, BF16).columns for out in (576, 4096, 6144, 28672, 128_256)] == [32, 32, 64, 128, 128]
    assert {Tile.of(out, BF16).rows for out in (1, 576, 4096, 6144, 28672)} == {ROWS}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ((random(2, 3), random(4, 3, dtype=BF16)), "one floating type"),
        ((random(2, 3), random(4, 5)), "x must be"),
        ((random(2, 3), random(4, 3), random(5)), r"bias must be \[4\]"),
        ((random(2, 3), random(3, 4).T), "contiguous"),
    ],
)
def test_what_cannot_be_multiplied_is_refused(given: tuple[Tensor, ...], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        matmul(*given)


SHAPES: list[tuple[int, int, int, int, torch.dtype]] = [
    (4, 2, 16, 10, F32),
    (9, 3, 64, 64, F16),
    (3, 3, 16, 32, BF16),
    (20, 1, 16, 32, F32),
]
"""Heads, those of keys and values, a page, their width; the last has groups of more than a program's rows."""
LENGTH = 50
LITTLE = Attention(split=32, keys=32)


def cached(kv_heads: int, block: int, width: int, dtype: torch.dtype, length: int) -> tuple[Tensor, Tensor]:
    """A cache that holds one branch, in pages in no order, and beyond it NaN."""
    depth = -(-length // block)
    order = torch.randperm(depth + 3, device=DEVICE)
    cache = torch.full((2, len(order), kv_heads, block, width), torch.nan, dtype=dtype, device=DEVICE)
    for place in range(depth):
        held = min(block, length - place * block)
        cache[:, order[place], :, :held] = random(2, kv_heads, held, width, dtype=dtype)
    return cache, order[:depth].to(torch.int32)[None]


def attended(queries: Tensor, cache: Tensor, table: Tensor, cut: list[int], window: int | None) -> Tensor:
    """Of a branch whose tokens come in so many pieces, each over what stands before it and itself alone."""
    found, at = [], 0
    block, empty = cache.shape[3], torch.full_like(cache, torch.nan)
    for count in cut:
        held = empty.clone()
        for place in range(-(-(at + count) // block)):  # what comes later is not there yet
            page, there = table[0, place], min(block, at + count - place * block)
            held[:, page, :, :there] = cache[:, page, :, :there]
        tiles = Tiles.of([(0, at, count, 0)], 1 if count == 1 else 16, DEVICE)
        found.append(invariant_attention(queries[at : at + count], held, table, tiles, window, tuned=LITTLE))
        at += count
    return torch.cat(found)


SEEN = [*((shape, None) for shape in SHAPES), *((SHAPES[0], size) for size in (1, 25, 45)), (SHAPES[2], 25)]


@pytest.mark.parametrize(("shape", "window"), SEEN)
def test_a_token_attends_alike_in_any_piece_of_its_prompt_and_decoded(shape: Any, window: int | None) -> None:
    heads, kv_heads, block, width, dtype = shape
    cache, table = cached(kv_heads, block, width, dtype, LENGTH)
    queries = 2 * random(LENGTH, heads, width, dtype=dtype) * width**-0.5
    whole = attended(queries, cache, table, [LENGTH], window)
    for cut in ([1, 2, 28, *[1] * 4, 15], [33, 1, 14, 1, 1], [17, 32, 1]):
        assert torch.equal(attended(queries, cache, table, cut, window), whole)
    tiles = Tiles.of([(0, 0, LENGTH, 0)], 16, DEVICE)
    exact = paged.paged_attention(queries.double(), cache.double(), table, tiles, window)
    allowed = 2e-6 + (ULP[dtype] * (exact.abs() + 1) if dtype != F32 else 0.0)
    assert bool(((whole.double() - exact).abs() <= allowed).all())


def test_without_it_a_prompt_and_decoding_differ_so_that_the_test_above_can_fail() -> None:
    heads, kv_heads, block, width, dtype = SHAPES[0]
    cache, table = cached(kv_heads, block, width, dtype, LENGTH)
    queries = random(LENGTH, heads, width)
    runs = [(0, 0, LENGTH, 0)]
    one, other = (
        paged_attention(queries, cache, table, Tiles.of(runs, size, DEVICE), tuned=LITTLE) for size in (1, 16)
    )
    assert torch.allclose(one, other, atol=1e-5)
    assert not torch.equal(one, other)


def test_a_token_attends_alike_beside_longer_texts() -> None:
    """More splits than its own, and other tiles."""
    heads, kv_heads, block, width, dtype = SHAPES[0]
    cache, table = cached(kv_heads, block, width, dtype, LENGTH)
    queries = random(40, heads, width)
    runs = [(0, 20, 1, 0), (1, 49, 1, 0), (2, 31, 1, 0)]
    crowd = invariant_attention(queries, cache, table, Tiles.of(runs, 1, DEVICE), tuned=LITTLE)
    prompts = [(3, 30, 18, 0), (21, 2, 9, 0)]
    invariant_attention(queries, cache, table, Tiles.of(prompts, 16, DEVICE), None, crowd, tuned=LITTLE)
    for first, start, count, _ in [*runs, *prompts]:
        alone = Tiles.of([(first, start, count, 0)], 1 if count == 1 else 16, DEVICE)
        found = invariant_attention(queries, cache, table, alone, tuned=LITTLE)
        assert torch.equal(found[first : first + count], crowd[first : first + count])


@types
def test_norms_turns_and_gates_are_each_rows_own(dtype: torch.dtype) -> None:
    x, weight = random(23, 66, dtype=dtype), random(66)
    eps, cos, sin = torch.tensor([1e-5], device=DEVICE), random(23, 22), random(23, 22)
    norm = HeadNorm(random(2, 22), eps)

    def written(rows: slice) -> Tensor:
        """The turned queries, and what is written of keys and values, in pages of one token."""
        cache = torch.full((2, 23, 1, 1, 22), torch.nan, dtype=dtype, device=DEVICE)
        page = torch.arange(23, device=DEVICE)[rows]
        turns, nowhere = Turns(cos[rows], sin[rows], 1, 1, 0.2), torch.zeros_like(page)
        queries = rope_write(x[rows].view(-1, 3, 22), turns, norm, cache, page, nowhere)
        return torch.cat((queries.flatten(1), cache[:, page].movedim(0, 1).flatten(1)), 1)

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


def test_a_request_is_steered_alike_whatever_the_others_of_its_step_ask_for() -> None:
    """A trust region, rewards, a mask, filters and a delay, each beside plain requests."""
    vocab, draw = 97, Draw(temperature=0.8, top_k=20, top_p=0.9, min_p=0.01, seed=3)
    region = Program(base=-4.6, scale=5.6, reward=1.0, kl_budget=0.2)
    kinds = [
        (Program(), 1, Draw()),
        (region, 3, draw),
        (Program(base=-2.0, scale=3.0, mask_top_p=0.8), 2, draw),
    ]
    kinds += [(Program(base=-1.0, scale=2.0, delay=1.0), 2, Draw()), (Program(), 1, Draw())]
    logits = 3 * random(sum(branches for _, branches, _ in kinds), vocab)
    table = SteerTable(vocab, DEVICE)
    for row, (program, branches, drawn) in enumerate(kinds):
        table.admit(row, program, [1 / max(branches - 1, 1)] * (branches - 1), drawn)

    def steered(rows: list[int], how: Callable[..., Choice]) -> Choice:
        firsts = [sum(branches for _, branches, _ in kinds[:row]) for row in rows]
        held = [logits[first : first + kinds[row][1]] for first, row in zip(firsts, rows, strict=True)]
        groups = Groups.of([(row, range(kinds[row][1])) for row in rows], DEVICE)
        return how(torch.cat(held), groups, deepcopy(table), trace=True)

    crowd = steered([0, 1, 2, 3, 4], invariant_steer)
    first = 0
    for row, (_, branches, _) in enumerate(kinds):
        alone, usual = (steered([row], how) for how in (invariant_steer, steer))
        for name in ("tokens", "failed", "logprob", "strength", "kl"):
            found = getattr(crowd, name)[row : row + 1]
            assert torch.equal(found.nan_to_num(-7), getattr(alone, name).nan_to_num(-7))
            assert torch.allclose(found.double(), getattr(usual, name).double(), atol=1e-5, equal_nan=True)
        own = crowd.branch_logprobs[first : first + branches]
        assert torch.equal(own, alone.branch_logprobs)
        assert torch.allclose(own, usual.branch_logprobs, atol=1e-5)
        first += branches
