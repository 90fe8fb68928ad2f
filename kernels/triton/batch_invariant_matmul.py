"""y = x Wᵀ + b, where a row's bits are its own: whatever rows stand beside it, and however many.

    y[r, c] = b[c] + Σ_k x[r, k] W[c, k],   k in steps of DEPTH, one after the other, into one float32 sum

A vendor's library takes another kernel for another number of rows, and some cut the sum over k into parts, so
that a row's last bits depend on its neighbours. Here any number of rows is cut into tiles of one height, the
last filled up with zeros, and all tiles run the same machine code: one program has all of k, so that there
are no partial sums, and the number of rows is a plain argument that nothing is compiled for. Of a tensor
core's product each row is a sum of its own, in the same order for all rows of the tile.

The height is 64: a weight of two bytes is then worth 64 multiplications and 64 additions, under half of what
any of the GPUs does while it reads two bytes, so that few rows still wait for memory and not for arithmetic
on zeros. Prompts reread the weights once for each 64 rows, from the cache. How wide a tile is follows the
weight's shape alone: a small product is cut into narrow ones, so that there are programs for most of a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dot import UPCAST

ROWS = 64
"""Of a tile, whatever the number of rows."""
PROGRAMS = 96
"""A tile is as wide as leaves so many programs for one tile of rows, or the narrowest."""


@dataclass(frozen=True)
class Tile:
    """Of one program: rows, outputs, how much of the sum at once, warps, stages of its loop."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int

    @classmethod
    def of(cls, out: int, dtype: torch.dtype) -> Tile:
        """For a weight with so many outputs. Float32 has no tensor core, and its sums are written out."""
        if dtype == torch.float32:
            return EXACT
        return next((tile for tile in TILES if out >= PROGRAMS * tile.columns), TILES[-1])


TILES = (Tile(ROWS, 128, 64, 4, 3), Tile(ROWS, 64, 64, 4, 4), Tile(ROWS, 32, 64, 4, 5))
"""Widest first. As many stages as an MI300X has memory for."""
EXACT = Tile(32, 32, 32, 4, 2)


@triton.jit(do_not_specialize=["rows"])
def matmul_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, rows, out,
    INNER: tl.constexpr, BIASED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """x [rows, INNER], weight [out, INNER], bias [out] where BIASED → [rows, out]."""
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    column = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)).to(tl.int64)
    there, inside, depth = row < rows, column < out, tl.arange(0, DEPTH)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, INNER, DEPTH):
        at = start + depth[None, :]
        of_x, of_weight = there[:, None], inside[:, None]
        if INNER % DEPTH != 0:
            of_x, of_weight = of_x & (at < INNER), of_weight & (at < INNER)
        x = tl.load(x_ptr + row[:, None] * INNER + at, mask=of_x, other=0.0)
        weight = tl.load(weight_ptr + column[:, None] * INNER + at, mask=of_weight, other=0.0)
        if UPCAST:
            x, weight = x.to(tl.float32), weight.to(tl.float32)
        total = tl.dot(x, tl.trans(weight), total, input_precision="ieee")
    if BIASED:
        total += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    tl.store(out_ptr + row[:, None] * out + column[None, :], total, mask=there[:, None] & inside[None, :])


def matmul(x: Tensor, weight: Tensor, bias: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """See `kernels.reference.matmul.matmul`; x, weight and bias of one type: float32, bfloat16 or float16.

    Raises ValueError for other types and shapes, and for a weight that is not contiguous.
    """
    _check(x, weight, bias)
    (rows, inner), out = x.shape, len(weight)
    x = x.contiguous()
    if x.data_ptr() % 16:  # what begins elsewhere is read by other code
        x = x.clone()
    tile = Tile.of(out, x.dtype)
    found = torch.empty(rows, out, dtype=dtype or x.dtype, device=x.device)
    if rows:
        matmul_kernel[(triton.cdiv(rows, tile.rows), triton.cdiv(out, tile.columns))](
            x, weight, weight if bias is None else bias, found, rows, out,
            INNER=inner, BIASED=bias is not None, ROWS=tile.rows, COLUMNS=tile.columns, DEPTH=tile.depth,
            UPCAST=UPCAST, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return found


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    types = {x.dtype, weight.dtype} | ({bias.dtype} if bias is not None else set())
    if len(types) > 1 or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"x, weight and bias must be of one floating type, not {sorted(map(str, types))}")
    shapes = tuple(x.shape), tuple(weight.shape)
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"x must be [rows, in] and weight [out, in]; they are {shapes}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{len(weight)}] and is {tuple(bias.shape)}")
    if not weight.is_contiguous() or (bias is not None and not bias.is_contiguous()):
        raise ValueError(f"weight and bias must be contiguous; the weight has strides {weight.stride()}")
