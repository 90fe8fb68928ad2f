"""Batch-invariant linear layer, y = x Wᵀ + b: the bits of a row do not depend on the rest of the batch.

    y[r, c] = b[c] + Σ_k x[r, k] W[c, k],   k in sequential steps of BLOCK_K, into one float32 accumulator

Vendor libraries select a kernel by the number of rows, and some split the sum over k (split-K), so that a
row's last bits depend on the batch. Here the rows are cut into tiles of one height, the last padded with
zeros, and all tiles run the same machine code: one program covers all of k, so that there are no partial
sums, and M is a runtime argument without specialisation. Each row of a tensor-core product is an independent
sum, in the same order for all rows of the tile.

The height is 64: each two-byte weight then takes 64 multiplications and 64 additions, under half of what any
of the GPUs does while it reads two bytes, so that small batches stay bound by memory, not by arithmetic on
padding. Prompts reread the weights once per 64 rows, from the cache. The tile width depends on the weight's
shape alone: small products use narrow tiles, so that there are enough programs for most of a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .dot import UPCAST

BLOCK_M = 64
"""Rows of a tile, whatever the number of rows of x."""
MIN_PROGRAMS = 96
"""The widest tile with at least this many programs per row tile is used; if there is none, the narrowest."""


@dataclass(frozen=True)
class MatmulTile:
    """Tile of one program: rows, output features, inner dimension per step, warps, pipeline stages."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int

    @classmethod
    def from_weight_shape(cls, out_features: int, dtype: torch.dtype) -> MatmulTile:
        """Tile for a weight with `out_features` rows. Float32, without tensor cores, is unrolled to FMAs."""
        if dtype == torch.float32:
            return FP32_TILE
        return next((tile for tile in TILES if out_features >= MIN_PROGRAMS * tile.block_n), TILES[-1])


TILES = (
    MatmulTile(BLOCK_M, 128, 64, 4, 3),
    MatmulTile(BLOCK_M, 64, 64, 4, 4),
    MatmulTile(BLOCK_M, 32, 64, 4, 5),
)
"""Widest first. As many stages as fit in the shared memory of an MI300X."""
FP32_TILE = MatmulTile(32, 32, 32, 4, 2)


@triton.jit(do_not_specialize=["M"])
def matmul_kernel(
    x_ptr, weight_ptr, bias_ptr, out_ptr, M, N,
    K: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """x [M, K], weight [N, K], bias [N] if HAS_BIAS → [M, N]."""
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
    """See `kernels.reference.matmul.matmul`; x, weight and bias of one dtype: float32, bfloat16, float16.

    Raises ValueError for other dtypes and shapes, and for a weight or bias that is not contiguous.
    """
    _check_args(x, weight, bias)
    (M, K), N = x.shape, len(weight)
    x = x.contiguous()
    if x.data_ptr() % 16:  # unaligned pointers compile to another variant
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
    dtypes = {x.dtype, weight.dtype} | ({bias.dtype} if bias is not None else set())
    if len(dtypes) > 1 or x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"x, weight and bias must share one floating dtype, got {sorted(map(str, dtypes))}")
    shapes = tuple(x.shape), tuple(weight.shape)
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(f"expected x [rows, in] and weight [out, in], got {shapes}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [{len(weight)}], got {tuple(bias.shape)}")
    if not weight.is_contiguous() or (bias is not None and not bias.is_contiguous()):
        raise ValueError(f"weight and bias must be contiguous, got weight strides {weight.stride()}")
