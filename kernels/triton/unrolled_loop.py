"""Unrolled optimisation loop of Amulet and MATO, to compare with `kernels.steering.closed_form`.

The utility is affine in the iterate, so the normaliser of each step is a constant over the vocabulary, which
later softmaxes cancel. Without it every token iterates independently,

    U ← U + α (x − b),    x ← [ λ p + U/t + x/(η t) ] / [ λ + 1/(η t) ],    t = 1..T,    x = p, U = 0 at first

and all T steps are one launch that reads b and p once. The result equals b + a_T (p − b) up to a constant.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024


@triton.jit(do_not_specialize=["num_elements", "iterations"])
def unrolled_loop_kernel(
    base_ptr, anchor_ptr, params_ptr, out_ptr, num_elements, iterations, BLOCK: tl.constexpr
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < num_elements
    b = tl.load(base_ptr + offs, mask=mask, other=0.0)
    p = tl.load(anchor_ptr + offs, mask=mask, other=0.0)
    alpha, lam, eta = tl.load(params_ptr), tl.load(params_ptr + 1), tl.load(params_ptr + 2)
    policy, utility = p, p - p
    t = alpha - alpha
    for _ in range(iterations):
        t += 1.0
        utility += alpha * (policy - b)
        policy = (lam * p + utility / t + policy / (eta * t)) / (lam + 1.0 / (eta * t))
    tl.store(out_ptr + offs, policy, mask=mask)


def unrolled_loop(
    base: Tensor, anchor: Tensor, alpha: float, lam: float, eta: float, iterations: int
) -> Tensor:
    """Scores of π_T up to a constant per row, with the shape and dtype of base and anchor.

    base, anchor: log-probabilities [rows, vocab], float32 or float64; otherwise raises ValueError.
    """
    if base.shape != anchor.shape or base.dtype != anchor.dtype:
        raise ValueError("base and anchor must have the same shape and dtype")
    if base.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"base must be float32 or float64, got {base.dtype}")
    base, anchor = base.contiguous(), anchor.contiguous()
    out = torch.empty_like(base)
    params = torch.cat(
        [base.new_full((1,), value) for value in (alpha, lam, eta)]
    )  # new_full copies nothing from the host
    grid = (triton.cdiv(base.numel(), BLOCK),)
    unrolled_loop_kernel[grid](base, anchor, params, out, base.numel(), iterations, BLOCK=BLOCK)
    return out
