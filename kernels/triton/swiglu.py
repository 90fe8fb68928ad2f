"""SwiGLU activation, silu(gate) · up, in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_N = 1024


@triton.jit
def swiglu_kernel(gate_up_ptr, out_ptr, intermediate_size, BLOCK_N: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < intermediate_size
    gate = tl.load(gate_up_ptr + row * 2 * intermediate_size + offs_n, mask=mask_n, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + (row * 2 + 1) * intermediate_size + offs_n, mask=mask_n, other=0.0).to(
        tl.float32
    )
    tl.store(out_ptr + row * intermediate_size + offs_n, gate / (1 + tl.exp(-gate)) * up, mask=mask_n)


def swiglu(gate_up: Tensor) -> Tensor:
    """gate_up [rows, 2 · intermediate], gate first → [rows, intermediate]."""
    num_rows, intermediate_size = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty(num_rows, intermediate_size, dtype=gate_up.dtype, device=gate_up.device)
    swiglu_kernel[(num_rows, triton.cdiv(intermediate_size, BLOCK_N))](
        gate_up, out, intermediate_size, BLOCK_N=BLOCK_N
    )
    return out
