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

BLOCK_M = 64
"""Of a tile, whatever the number of rows."""
MIN_PROGRAMS = 96
"""A tile is as wide as leaves so many programs for one tile of rows, or the narrowest."""


@dataclass(frozen=True)
class MatmulTile:
    """Of one program: rows, outputs, how much of the sum at once, warps, stages of its loop."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    @classmethod
    def from_weight_shape(cls, out_features: int, dtype: torch.dtype) -> MatmulTile:
        """For a weight with so many outputs. Float32 has no tensor core, and its sums are written out."""
        if dtype == torch.float32:
            return FP32_TILE
        return next((tile for tile in TILES if out_features >= MIN_PROGRAMS * tile.block_n), TILES[-1])


TILES = (
    MatmulTile(BLOCK_M, 128, 64, 4, 3),
    MatmulTile(BLOCK_M, 64, 64, 4, 4),
    MatmulTile(BLOCK_M, 32, 64, 4, 5),
)
"""Widest first. As many stages as an MI300X has memory for."""
FP32_TILE = MatmulTile(32, 32, 32, 4, 2)


@triton.jit(do_not_specialize=["M"])
def matmul_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, M, N,
    K: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """x [rows, INNER], weight [out, INNER], bias [out] where BIASED → [rows, out]."""
    offs_m = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    offs_n = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    mask_m, mask_n, offs_k = offs_m < M, offs_n < N, tl.arange(0, BLOCK_K)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for start_k in range(0, K, BLOCK_K):
        k_idx = start_k + offs_k[None, :]
        x_mask, weight_mask = mask_m[:, None], mask_n[:, None]
        if K % BLOCK_K != 0:
            x_mask, weight_mask = x_mask & (k_idx < K), weight_mask & (k_idx < K)
        x = tl.load(x_ptr + offs_m[:, None] * K + k_idx, mask=x_mask, other=0.0)
        weight = tl.load(weight_ptr + offs_n[:, None] * K + k_idx, mask=weight_mask, other=0.0)
        if UPCAST:
            x, weight = x.to(tl.float32), weight.to(tl.float32)
        acc = tl.dot(x, tl.trans(weight), acc, input_precision="ieee")
    if HAS_BIAS:
        acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    tl.store(out_ptr + offs_m[:, None] * N + offs_n[None, :], acc, mask=mask_m[:, None] & mask_n[None, :])


def matmul(x: Tensor, weight: Tensor, bias: Tensor | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """See `kernels.reference.matmul.matmul`; x, weight and bias of one type: float32, bfloat16 or float16.

    Raises ValueError for other types and shapes, and for a weight that is not contiguous.
    """
    _check_args(x, weight, bias)
    (M, K), N = x.shape, len(weight)
    x = x.contiguous()
    if x.data_ptr() % 16:  # what begins elsewhere is read by other code
        x = x.clone()
    tile = MatmulTile.from_weight_shape(N, x.dtype)
    out = torch.empty(M, N, dtype=dtype or x.dtype, device=x.device)
    if M:
        matmul_kernel[(triton.cdiv(M, tile.block_m), triton.cdiv(N, tile.block_n))](
            x, weight, weight if bias is None else bias, out, M, N,
            K=K, HAS_BIAS=bias is not None, BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
            UPCAST=UPCAST, num_warps=tile.num_warps, num_stages=tile.num_stages,
        )  # fmt: skip
    return out


def _check_args(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
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
