"""What threads read and write: the tensors of a launch, where they are in this process, and shared memory."""

from __future__ import annotations

import ctypes
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from .gpu_math import Array

PAGE = 1 << 12
SPACE = (1 << 47) - PAGE
"""Addresses that a process has."""
PROGRAMS, MOST = np.uint64(16), np.uint64(0xFFFF)
"""Bits that tell programs of a launch apart."""
SIZES = (1, 2, 4, 8)


class FaultError(Exception):
    """A thread did what a GPU would trap at, or what has no defined result."""


class Tensors:
    """Memory by the addresses of this process, of which only given tensors may be touched.

    After a launch `settle` looks at what several programs did to the same bytes.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        merged = list[list[int]]()
        for start, end in sorted({_span(tensor) for tensor in tensors if tensor.numel()}):
            if merged and start <= merged[-1][1]:
                merged[-1][1] = max(end, merged[-1][1])
            else:
                merged.append([start, end])
        self.starts = np.array([start for start, _ in merged], np.uint64)
        self.ends = np.array([end for _, end in merged], np.uint64)
        whole = (ctypes.c_uint8 * SPACE).from_address(PAGE)
        self.views = {size: np.frombuffer(whole, f"u{size}") for size in SIZES}
        self.read: dict[int, list[Array]] = defaultdict(list)
        self.written = list[Array]()
        """What was read, by its size, and bytes that were written, with their values; see `_marked`."""

    def check(self, at: Array, size: int) -> None:
        """Whether threads may touch so many bytes there."""
        if (wrong := at % np.uint64(size) != 0).any():
            raise FaultError(f"{size} bytes at {int(at[wrong][0]):#x} are not aligned")
        place = np.searchsorted(self.starts, at, side="right") - 1
        if (wrong := (place < 0) | (at + np.uint64(size) > self.ends[np.maximum(place, 0)])).any():
            raise FaultError(f"{size} bytes at {int(at[wrong][0]):#x} are in no tensor of the launch")

    def reads(self, at: Array, programs: Array, size: int) -> None:
        """Checks that threads may, and notes that they do."""
        self.check(at, size)
        self.read[size].append(_marked(at, programs))

    def load(self, at: Array, programs: Array, size: int) -> Array:
        return self.views[size][(at - np.uint64(PAGE)) // np.uint64(size)]

    def store(self, at: Array, programs: Array, values: Array) -> None:
        size = values.itemsize
        bytes_ = np.ascontiguousarray(values).view(np.uint8).astype(np.uint64)
        self.written.append(np.stack([_spread(_marked(at, programs), size), bytes_]))
        self.views[size][(at - np.uint64(PAGE)) // np.uint64(size)] = values

    def settle(self) -> None:
        """Raises FaultError where one program wrote and another read; NaN where two wrote differently."""
        if not self.written:
            return
        marks, values = np.concatenate(self.written, 1)
        order = np.argsort(marks, kind="stable")
        marks, values = marks[order], values[order]
        last = np.append(marks[1:] != marks[:-1], True)  # what a program wrote last
        marks, values = marks[last], values[last]
        at, by = marks >> PROGRAMS, marks & MOST
        differ = (at[1:] == at[:-1]) & (values[1:] != values[:-1])
        self.views[1][at[1:][differ] - np.uint64(PAGE)] = 0xFF
        changed = np.unique(np.searchsorted(self.starts, at, side="right"))
        for size, marked in self.read.items():
            tensors = (np.searchsorted(self.starts, marks >> PROGRAMS, side="right") for marks in marked)
            inside = [marks[np.isin(own, changed)] for marks, own in zip(marked, tensors, strict=True)]
            marks = np.unique(_spread(np.concatenate(inside), size))
            read, reader = marks >> PROGRAMS, marks & MOST
            for side in ("left", "right"):  # the first program that wrote there, and the last
                place = np.clip(np.searchsorted(at, read, side) - (side == "right"), 0, at.size - 1)
                if (raced := (at[place] == read) & (by[place] != reader)).any():
                    raise FaultError(f"what one program wrote at {int(read[raced][0]):#x} another reads")


def _marked(at: Array, programs: Array) -> Array:
    """Addresses, with the program in their lower bits."""
    return (at << PROGRAMS) | programs.astype(np.uint64)


def _spread(marks: Array, size: int) -> Array:
    """Of lots of so many bytes, each byte's."""
    return (marks[:, None] + (np.arange(size, dtype=np.uint64) << PROGRAMS)).reshape(-1)


def _span(tensor: Tensor) -> tuple[int, int]:
    """Where a tensor begins, and where it ends."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


class Scratch:
    """Memory of each program's, or each thread's, own: `size` bytes, NaN until something is written."""

    def __init__(self, owners: int, size: int) -> None:
        self.size = -(-size // 16) * 16
        whole = np.full(owners * self.size, 0xFF, np.uint8)
        self.views = {size: whole.view(f"u{size}") for size in SIZES}

    def check(self, at: Array, size: int) -> None:
        if (wrong := at % at.dtype.type(size) != 0).any():
            raise FaultError(f"{size} bytes at {int(at[wrong][0])} are not aligned")
        if at.size and int(at.max()) + size > self.size:
            raise FaultError(f"{size} bytes at {int(at.max())} are past {self.size}")

    def reads(self, at: Array, owners: Array, size: int) -> None:
        """Checks that threads may."""
        self.check(at, size)

    def load(self, at: Array, owners: Array, size: int) -> Array:
        return self.views[size][(owners * self.size + at.astype(np.int64)) // size]

    def store(self, at: Array, owners: Array, values: Array) -> None:
        size = values.dtype.itemsize
        self.views[size][(owners * self.size + at.astype(np.int64)) // size] = values
