"""QK-norm, rotary position embedding and KV-cache write in one launch, between QKV projection and attention.

Each program handles one head of one token: normalise it (queries and keys, if the model has QK-norm), rotate
it (queries and keys), then store queries in a new tensor, and keys and values in their KV blocks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from ..reference.rotary import QKNorm, RotaryCosSin


@triton.jit(do_not_specialize=["num_tokens", "num_blocks"])
def rope_and_write_kv_kernel(
    qkv_ptr, cos_ptr, sin_ptr, norm_weight_ptr, eps_ptr, block_ids_ptr, block_offsets_ptr, q_ptr,
    kv_cache_ptr,
    num_tokens, num_blocks, q_scale,
    NUM_HEADS: tl.constexpr, NUM_KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, HAS_NORM: tl.constexpr,
):  # fmt: skip
    """kv_cache [2, num_blocks, NUM_KV_HEADS, BLOCK_SIZE, HEAD_DIM]; rows ≥ num_tokens are not cached."""
    token_idx, head_idx = tl.program_id(0).to(tl.int64), tl.program_id(1)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < HEAD_DIM
    rotated_d = (offs_d + HEAD_DIM // 2) % HEAD_DIM
    qkv_row_ptr = qkv_ptr + (token_idx * (NUM_HEADS + 2 * NUM_KV_HEADS) + head_idx) * HEAD_DIM
    x = tl.load(qkv_row_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    if head_idx < NUM_HEADS + NUM_KV_HEADS:
        x_rotated = tl.load(qkv_row_ptr + rotated_d, mask=mask_d, other=0.0).to(tl.float32)
        if HAS_NORM:
            rstd = tl.rsqrt(tl.sum(x * x, axis=0) / HEAD_DIM + tl.load(eps_ptr))
            x *= rstd * tl.load(norm_weight_ptr + head_idx * HEAD_DIM + offs_d, mask=mask_d, other=0.0)
            x_rotated *= rstd * tl.load(
                norm_weight_ptr + head_idx * HEAD_DIM + rotated_d, mask=mask_d, other=0.0
            )
        cos = tl.load(cos_ptr + token_idx * HEAD_DIM + offs_d, mask=mask_d, other=0.0)
        sin = tl.load(sin_ptr + token_idx * HEAD_DIM + offs_d, mask=mask_d, other=0.0)
        x = x * cos + x_rotated * sin
    if head_idx < NUM_HEADS:
        tl.store(q_ptr + (token_idx * NUM_HEADS + head_idx) * HEAD_DIM + offs_d, x * q_scale, mask=mask_d)
    elif token_idx < num_tokens:
        is_value, kv_head = (head_idx - NUM_HEADS) // NUM_KV_HEADS, (head_idx - NUM_HEADS) % NUM_KV_HEADS
        block_idx = is_value * num_blocks + tl.load(block_ids_ptr + token_idx)
        kv_offs = (
            (block_idx * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + tl.load(block_offsets_ptr + token_idx)
        ) * HEAD_DIM
        tl.store(kv_cache_ptr + kv_offs + offs_d, x, mask=mask_d)


def rope_and_write_kv(
    qkv: Tensor,
    cos_sin: RotaryCosSin,
    qk_norm: QKNorm | None,
    kv_cache: Tensor,
    block_ids: Tensor,
    block_offsets: Tensor,
) -> Tensor:
    """Return the rotated queries, and write keys and values to the cache. All tensors are contiguous. See
    `kernels.reference.rotary.rope_and_write_kv`.
    """
    num_rows, num_qkv_heads, head_dim = qkv.shape
    _, num_blocks, num_kv_heads, block_size, _ = kv_cache.shape
    queries = torch.empty(num_rows, cos_sin.num_heads, head_dim, dtype=kv_cache.dtype, device=kv_cache.device)
    norm_weight, eps = (qk_norm.weight, qk_norm.eps) if qk_norm else (cos_sin.cos, cos_sin.cos)
    rope_and_write_kv_kernel[(num_rows, num_qkv_heads)](
        qkv, cos_sin.cos, cos_sin.sin, norm_weight, eps, block_ids, block_offsets, queries, kv_cache,
        len(block_ids), num_blocks, cos_sin.q_scale,
        NUM_HEADS=cos_sin.num_heads, NUM_KV_HEADS=num_kv_heads, HEAD_DIM=head_dim,
        BLOCK_D=triton.next_power_of_2(head_dim),
        BLOCK_SIZE=block_size, HAS_NORM=qk_norm is not None, num_warps=1,
    )  # fmt: skip
    return queries
