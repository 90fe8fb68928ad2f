"""What a step sends to its device and what it reads back: one copy each way, however many tensors it is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

CPU = torch.device("cpu")
ALIGNED = 16
"""Bytes that each part's beginning is a multiple of: for other pointers Triton compiles other kernels."""
TYPES = {
    np.dtype(np.int64): torch.int64,
    np.dtype(np.int32): torch.int32,
    np.dtype(np.float32): torch.float32,
    np.dtype(np.float64): torch.float64,
}


def send(device: torch.device, *columns: np.ndarray[Any, Any]) -> list[Tensor]:
    """The columns as tensors on the device; the host does not wait. On a CPU they keep their memory."""
    if device.type == "cpu":
        return [torch.from_numpy(column) for column in columns]
    return unpack(pack(device, columns).to(device, non_blocking=True), columns)


def pack(device: torch.device, columns: Sequence[np.ndarray[Any, Any]]) -> Tensor:
    """The bytes of all columns on the host, [bytes] uint8, in memory that a GPU copies from by itself."""
    starts = _starts([column.nbytes for column in columns])
    pinned = device.type == "cuda" and torch.cuda.is_available()
    packed = torch.empty(starts[-1], dtype=torch.uint8, device=CPU, pin_memory=pinned)
    into = packed.numpy()
    for start, column in zip(starts, columns, strict=False):
        into[start : start + column.nbytes] = np.ascontiguousarray(column).reshape(-1).view(np.uint8)
    return packed


def unpack(packed: Tensor, like: Sequence[np.ndarray[Any, Any]]) -> list[Tensor]:
    """Views of packed bytes, of the columns' types and shapes."""
    starts = _starts([column.nbytes for column in like])
    return [
        packed[start : start + column.nbytes].view(TYPES[column.dtype]).view(column.shape)
        for start, column in zip(starts, like, strict=False)
    ]


def fetch(tensors: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
    """Sends a GPU's tensors to the host, which waits for them when it calls the result."""
    packed = torch.cat([tensor.contiguous().flatten().view(torch.uint8) for tensor in tensors])
    host = torch.empty(packed.shape, dtype=torch.uint8, device=CPU, pin_memory=packed.is_cuda)
    host.copy_(packed, non_blocking=True)
    sent = torch.cuda.Event()
    sent.record()
    return lambda: _arrived(tensors, host, sent)


def _arrived(tensors: Sequence[Tensor], host: Tensor, sent: torch.cuda.Event) -> list[Tensor]:
    """Parts of the host's bytes, of the tensors' types and shapes."""
    sent.synchronize()
    found, start = [], 0
    for tensor in tensors:
        part = host[start : start + tensor.nbytes].clone()  # a view must begin where its type allows
        found.append(part.view(tensor.dtype).view(tensor.shape))
        start += tensor.nbytes
    return found


def _starts(sizes: Sequence[int]) -> list[int]:
    """Where parts of these bytes begin, and after the last where all end."""
    return [0, *accumulate(math.ceil(size / ALIGNED) * ALIGNED for size in sizes)]
