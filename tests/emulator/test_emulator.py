"""The PTX emulator: correct results, and errors for what a GPU would trap on or leave undefined."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="compiling kernels needs triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("an interpreting process cannot compile", allow_module_level=True)

import triton.language as tl

from .control_flow import reconvergence_order
from .launch import emulate
from .memory import MemoryFaultError

BF16, F16 = torch.bfloat16, torch.float16


@pytest.fixture(params=["sm_80", "sm_90"], autouse=True)
def _emulated(request: pytest.FixtureRequest) -> Iterator[None]:
    with emulate(request.param):
        yield


@triton.jit
def dot_kernel(
    left_ptr, right_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, TURNED: tl.constexpr
):  # fmt: skip
    row, column, inner = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    left = tl.load(left_ptr + row[:, None] * K + inner[None, :])
    if TURNED:
        right = tl.trans(tl.load(right_ptr + column[:, None] * K + inner[None, :]))
    else:
        right = tl.load(right_ptr + inner[:, None] * N + column[None, :])
    tl.store(out_ptr + row[:, None] * N + column[None, :], tl.dot(left, right))


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
@pytest.mark.parametrize("shape", [(16, 16, 16), (16, 64, 32), (64, 32, 64), (128, 64, 16), (64, 128, 128)])
def test_tensor_core_products_match_float64(
    shape: tuple[int, int, int], dtype: torch.dtype, turned: bool
) -> None:
    """With at least 64 rows sm_90 uses wgmma, with fewer mma; the second operand is row- or column-major."""
    rows, columns, inner = shape
    left = torch.randn(rows, inner, generator=torch.Generator().manual_seed(0)).to(dtype)
    right = torch.randn(inner, columns, generator=torch.Generator().manual_seed(1)).to(dtype)
    out = torch.full((rows, columns), torch.nan)
    dot_kernel[(1,)](left, right.T.contiguous() if turned else right, out, *shape, turned)
    assert torch.allclose(out.double(), left.double() @ right.double(), rtol=0, atol=2e-5)


@triton.jit
def shift_kernel(from_ptr, to_ptr, size, step, BLOCK: tl.constexpr):
    """Each program copies its block from `step` elements further on."""
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(to_ptr + offs, tl.load(from_ptr + step + offs, mask=offs + step < size, other=-1.0))


@pytest.mark.parametrize("dtype", [torch.float32, BF16, torch.uint8], ids=str)
def test_masked_lanes_touch_no_memory_and_out_of_bounds_access_raises(dtype: torch.dtype) -> None:
    source, out = torch.arange(100).to(dtype), torch.zeros(128, dtype=dtype)
    shift_kernel[(2,)](source, out, 100, 3, 64)
    assert out[:97].tolist() == source[3:].tolist()
    assert (out[97:] == torch.tensor(-1.0).to(torch.int8).to(dtype)).all()
    with pytest.raises(
        MemoryFaultError, match=r"shifted .* bytes at .* are outside the tensors of the launch, in 'ld\.|@%p"
    ):
        shift_kernel[(2,)](source, out, 128, 3, 64)
    with pytest.raises(MemoryFaultError, match="are outside the tensors"):
        shift_kernel[(2,)](source, out[:127], 100, 3, 64)


@triton.jit
def hint_kernel(from_ptr, to_ptr, step, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(to_ptr + offs, tl.load(from_ptr + tl.max_contiguous(tl.multiple_of(step + offs, BLOCK), BLOCK)))


def test_a_false_alignment_hint_raises() -> None:
    source, out = torch.arange(512.0), torch.zeros(256)
    hint_kernel[(1,)](source, out, 48, 256, num_warps=1)
    assert out.tolist() == source[48:304].tolist()
    with pytest.raises(MemoryFaultError, match=r"16 bytes at .* are not aligned"):
        hint_kernel[(1,)](source, out, 3, 256, num_warps=1)


def test_a_read_write_race_between_programs_raises() -> None:
    numbers = torch.arange(256.0)
    shift_kernel[(4,)](numbers, numbers, 256, 0, 64)  # each program reads only what it writes itself
    assert numbers.tolist() == list(range(256))
    with pytest.raises(MemoryFaultError, match=r"race at .*: one program writes it and another reads it"):
        shift_kernel[(4,)](numbers, numbers, 256, 64, 64)


@triton.jit
def write_kernel(to_ptr, BLOCK: tl.constexpr, OWN: tl.constexpr):
    value = tl.program_id(0) if OWN else 7
    tl.store(to_ptr + tl.arange(0, BLOCK), value.to(tl.float32) if OWN else 7.0)


def test_equal_writes_of_several_programs_are_allowed() -> None:
    numbers = torch.zeros(32)
    write_kernel[(3,)](numbers, 32, False)
    assert numbers.tolist() == [7.0] * 32
    write_kernel[(3,)](numbers, 32, True)
    assert numbers.isnan().all()


@triton.jit
def functions_kernel(x_ptr, out_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    x = tl.load(x_ptr + offs)
    tl.store(out_ptr + offs, tl.log(x))
    tl.store(out_ptr + N + offs, tl.exp(x))
    tl.store(out_ptr + 2 * N + offs, 1.0 / x)
    tl.store(out_ptr + 3 * N + offs, tl.cumsum(x, axis=0))
    tl.store(out_ptr + 4 * N + offs, tl.where(x > 1, tl.floor(x), tl.sqrt(x)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_math_functions_match_torch(dtype: torch.dtype) -> None:
    """Some functions compile to loops and branches in which threads diverge."""
    x = torch.cat([torch.tensor([1e-38, 1e-30, 0.5, 1.0, 3.0, 80.0]), torch.rand(122)]).to(dtype)
    out = torch.full((5, 128), torch.nan, dtype=dtype)
    functions_kernel[(1,)](x, out, 128)
    exact = x.double()
    exact_values = (
        exact.log(),
        exact.exp(),
        1 / exact,
        exact.cumsum(0),
        torch.where(x > 1, exact.floor(), exact.sqrt()),
    )
    for actual, expected in zip(out, exact_values, strict=True):
        assert torch.allclose(actual.double(), expected, rtol=2e-6 if dtype == torch.float32 else 1e-14)


@triton.jit
def collatz_kernel(counts_ptr, out_ptr, N: tl.constexpr):
    """Collatz step counts; the loop runs until all N numbers of a program are 1."""
    offs = tl.program_id(0) * N + tl.arange(0, N)
    number, steps = tl.load(counts_ptr + offs), tl.zeros([N], tl.int32)
    while tl.max(number, axis=0) > 1:
        steps += (number > 1).to(tl.int32)
        odd = tl.where(number % 2 == 1, 3 * number + 1, number // 2)
        number = tl.where(number > 1, odd, number)
    tl.store(out_ptr + offs, steps)


def test_programs_leave_loops_independently() -> None:
    def steps(number: int) -> int:
        return 0 if number == 1 else 1 + steps(3 * number + 1 if number % 2 else number // 2)

    out = torch.zeros(128, dtype=torch.int32)
    collatz_kernel[(4,)](torch.arange(1, 129, dtype=torch.int32), out, 32)
    assert out.tolist() == [steps(number) for number in range(1, 129)]


@triton.jit
def atomic_kernel(to_ptr):
    tl.atomic_add(to_ptr, 1)


def test_an_unknown_instruction_raises() -> None:
    with pytest.raises(NotImplementedError, match="atom"):
        atomic_kernel[(1,)](torch.zeros(1, dtype=torch.int32))


@pytest.mark.parametrize(
    ("graph", "order"),
    [
        ([[1, 2], [3], [3], []], [0, 1, 2, 3]),  # if and else
        ([[2, 1], [], [1]], [0, 2, 1]),  # a branch placed after its target
        ([[1], [2, 3], [1], []], [0, 1, 2, 3]),  # a loop precedes its successors
        ([[1], [4, 2], [3], [1, 3], []], [0, 1, 2, 3, 4]),  # a nested loop
        ([[1], [2, 5], [3, 4], [2], [1], []], [0, 1, 2, 3, 4, 5]),
        ([[2], [], [2]], [0, 2]),  # an unreachable block
    ],
)
def test_blocks_are_in_reconvergence_order(graph: Any, order: list[int]) -> None:
    assert reconvergence_order(graph) == order
