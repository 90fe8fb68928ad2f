"""The choice of a weight format."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from . import fbgemm_fp16
from .fbgemm_fp16 import FbgemmFp16
from .unquantized import Unquantized

if TYPE_CHECKING:
    from ..reference.matmul import Matmul
    from .format import WeightFormat


def select_format(
    dtype: torch.dtype,
    device: torch.device,
    matmul: Matmul | None = None,
    compute_dtype: torch.dtype | None = None,
) -> WeightFormat:
    """The fastest format for weights of a checkpoint in `dtype` on `device`.

    matmul: computes the products in place of the format's own. compute_dtype: of activations and results,
    by default the fastest; float32 leaves results unrounded.
    """
    compute_dtype = compute_dtype or _fastest_dtype(dtype, device)
    is_widened = device.type == "cpu" and dtype != compute_dtype == torch.float32
    if is_widened and matmul is None and fbgemm_fp16.is_available():
        return FbgemmFp16()
    return Unquantized(compute_dtype, device, matmul)


def _fastest_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype of activations in a model stored as `dtype`."""
    if device.type != "cpu" or dtype == torch.float32:
        return dtype
    native_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return dtype if dtype == torch.bfloat16 and native_bf16 else torch.float32
