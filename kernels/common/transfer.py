"""Pack many small arrays into one copy between host and device."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

CPU = torch.device("cpu")
ALIGNMENT = 16
"""Alignment in bytes of each packed array: Triton compiles separate kernels for unaligned pointers."""
TORCH_DTYPES = {
    np.dtype(np.int64): torch.int64,
    np.dtype(np.int32): torch.int32,
    np.dtype(np.float32): torch.float32,
    np.dtype(np.float64): torch.float64,
}


def to_device(device: torch.device, *arrays: np.ndarray[Any, Any]) -> list[Tensor]:
    """Copy arrays to the device without blocking the host. On a CPU the tensors share their memory."""
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    return unpack_views(pack_pinned(device, arrays).to(device, non_blocking=True), arrays)


def pack_pinned(device: torch.device, arrays: Sequence[np.ndarray[Any, Any]]) -> Tensor:
    """Pack all arrays into one host tensor [bytes] uint8, in pinned memory if the device is a GPU."""
    offsets = _aligned_offsets([array.nbytes for array in arrays])
    pinned = device.type == "cuda" and torch.cuda.is_available()
    packed = torch.empty(offsets[-1], dtype=torch.uint8, device=CPU, pin_memory=pinned)
    buffer = packed.numpy()
    for offset, column in zip(offsets, arrays, strict=False):
        buffer[offset : offset + column.nbytes] = np.ascontiguousarray(column).reshape(-1).view(np.uint8)
    return packed


def unpack_views(packed: Tensor, arrays: Sequence[np.ndarray[Any, Any]]) -> list[Tensor]:
    """Views of the packed bytes with the arrays' dtypes and shapes."""
    offsets = _aligned_offsets([array.nbytes for array in arrays])
    return [
        packed[offset : offset + column.nbytes].view(TORCH_DTYPES[column.dtype]).view(column.shape)
        for offset, column in zip(offsets, arrays, strict=False)
    ]


def to_host_async(tensors: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
    """Start copying a GPU's tensors to the host; calling the result waits for them and returns them."""
    packed = torch.cat([tensor.contiguous().flatten().view(torch.uint8) for tensor in tensors])
    host = torch.empty(packed.shape, dtype=torch.uint8, device=CPU, pin_memory=packed.is_cuda)
    host.copy_(packed, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()
    return lambda: _wait_and_unpack(tensors, host, copied)


def _wait_and_unpack(tensors: Sequence[Tensor], host: Tensor, copied: torch.cuda.Event) -> list[Tensor]:
    """Unpack the host's bytes into tensors of the original dtypes and shapes."""
    copied.synchronize()
    unpacked, offset = [], 0
    for tensor in tensors:
        data = host[offset : offset + tensor.nbytes].clone()  # a view must be aligned for its dtype
        unpacked.append(data.view(tensor.dtype).view(tensor.shape))
        offset += tensor.nbytes
    return unpacked


def _aligned_offsets(sizes: Sequence[int]) -> list[int]:
    """Aligned start offsets of parts of these sizes, and the total size last."""
    return [0, *accumulate(math.ceil(size / ALIGNMENT) * ALIGNMENT for size in sizes)]
