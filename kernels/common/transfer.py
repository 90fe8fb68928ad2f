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
"""Bytes that each part's beginning is a multiple of: for other pointers Triton compiles other kernels."""
TORCH_DTYPES = {
    np.dtype(np.int64): torch.int64,
    np.dtype(np.int32): torch.int32,
    np.dtype(np.float32): torch.float32,
    np.dtype(np.float64): torch.float64,
}


def to_device(device: torch.device, *arrays: np.ndarray[Any, Any]) -> list[Tensor]:
    """The columns as tensors on the device; the host does not wait. On a CPU they keep their memory."""
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    return unpack_views(pack_pinned(device, arrays).to(device, non_blocking=True), arrays)


def pack_pinned(device: torch.device, arrays: Sequence[np.ndarray[Any, Any]]) -> Tensor:
    """The bytes of all columns on the host, [bytes] uint8, in memory that a GPU copies from by itself."""
    offsets = _aligned_offsets([array.nbytes for array in arrays])
    pinned = device.type == "cuda" and torch.cuda.is_available()
    packed = torch.empty(offsets[-1], dtype=torch.uint8, device=CPU, pin_memory=pinned)
    buffer = packed.numpy()
    for offset, column in zip(offsets, arrays, strict=False):
        buffer[offset : offset + column.nbytes] = np.ascontiguousarray(column).reshape(-1).view(np.uint8)
    return packed


def unpack_views(packed: Tensor, arrays: Sequence[np.ndarray[Any, Any]]) -> list[Tensor]:
    """Views of packed bytes, of the columns' types and shapes."""
    offsets = _aligned_offsets([array.nbytes for array in arrays])
    return [
        packed[offset : offset + column.nbytes].view(TORCH_DTYPES[column.dtype]).view(column.shape)
        for offset, column in zip(offsets, arrays, strict=False)
    ]


def to_host_async(tensors: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
    """Sends a GPU's tensors to the host, which waits for them when it calls the result."""
    packed = torch.cat([tensor.contiguous().flatten().view(torch.uint8) for tensor in tensors])
    host = torch.empty(packed.shape, dtype=torch.uint8, device=CPU, pin_memory=packed.is_cuda)
    host.copy_(packed, non_blocking=True)
    copied = torch.cuda.Event()
    copied.record()
    return lambda: _wait_and_unpack(tensors, host, copied)


def _wait_and_unpack(tensors: Sequence[Tensor], host: Tensor, copied: torch.cuda.Event) -> list[Tensor]:
    """Parts of the host's bytes, of the tensors' types and shapes."""
    copied.synchronize()
    unpacked, offset = [], 0
    for tensor in tensors:
        data = host[offset : offset + tensor.nbytes].clone()  # a view must begin where its type allows
        unpacked.append(data.view(tensor.dtype).view(tensor.shape))
        offset += tensor.nbytes
    return unpacked


def _aligned_offsets(sizes: Sequence[int]) -> list[int]:
    """Where parts of these bytes begin, and after the last where all end."""
    return [0, *accumulate(math.ceil(size / ALIGNMENT) * ALIGNMENT for size in sizes)]
