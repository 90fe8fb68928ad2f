"""Memory of the emulator: the tensors of a launch, at their addresses in this process, and shared memory."""

from __future__ import annotations

import ctypes
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from .gpu_math import Array

PAGE = 1 << 12
ADDRESS_SPACE = (1 << 47) - PAGE
"""Size of the address space of a process, without its first page."""
PROGRAM_BITS, PROGRAM_MASK = np.uint64(16), np.uint64(0xFFFF)
"""Bits of the program index in a tagged address."""
ACCESS_SIZES = (1, 2, 4, 8)


class MemoryFaultError(Exception):
    """An access that a GPU would trap on, or that has no defined result."""


class GlobalMemory:
    """Global memory at the addresses of this process, limited to the given tensors.

    After a launch `check_races` checks for accesses of several programs to the same bytes.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        ranges = list[list[int]]()
        for start, end in sorted({_address_range(tensor) for tensor in tensors if tensor.numel()}):
            if ranges and start <= ranges[-1][1]:
                ranges[-1][1] = max(end, ranges[-1][1])
            else:
                ranges.append([start, end])
        self.starts = np.array([start for start, _ in ranges], np.uint64)
        self.ends = np.array([end for _, end in ranges], np.uint64)
        memory = (ctypes.c_uint8 * ADDRESS_SPACE).from_address(PAGE)
        self.views = {size: np.frombuffer(memory, f"u{size}") for size in ACCESS_SIZES}
        self.reads_by_size: dict[int, list[Array]] = defaultdict(list)
        self.writes = list[Array]()
        """Tagged addresses of reads, by size, and of written bytes, with their values; see `_tag_program`."""

    def check(self, addresses: Array, size: int) -> None:
        """Raise MemoryFaultError for accesses that are misaligned or outside the tensors."""
        if (invalid := addresses % np.uint64(size) != 0).any():
            raise MemoryFaultError(f"{size} bytes at {int(addresses[invalid][0]):#x} are not aligned")
        tensor_index = np.searchsorted(self.starts, addresses, side="right") - 1
        if (
            invalid := (tensor_index < 0)
            | (addresses + np.uint64(size) > self.ends[np.maximum(tensor_index, 0)])
        ).any():
            raise MemoryFaultError(
                f"{size} bytes at {int(addresses[invalid][0]):#x} are outside the tensors of the launch"
            )

    def record_reads(self, addresses: Array, programs: Array, size: int) -> None:
        """Check the accesses, and record them for `check_races`."""
        self.check(addresses, size)
        self.reads_by_size[size].append(_tag_program(addresses, programs))

    def load(self, addresses: Array, programs: Array, size: int) -> Array:
        return self.views[size][(addresses - np.uint64(PAGE)) // np.uint64(size)]

    def store(self, addresses: Array, programs: Array, values: Array) -> None:
        size = values.itemsize
        byte_values = np.ascontiguousarray(values).view(np.uint8).astype(np.uint64)
        self.writes.append(np.stack([_each_byte(_tag_program(addresses, programs), size), byte_values]))
        self.views[size][(addresses - np.uint64(PAGE)) // np.uint64(size)] = values

    def check_races(self) -> None:
        """Raise MemoryFaultError if a program reads what another wrote; store NaN where writes conflict."""
        if not self.writes:
            return
        marks, values = np.concatenate(self.writes, 1)
        order = np.argsort(marks, kind="stable")
        marks, values = marks[order], values[order]
        is_last_write = np.append(marks[1:] != marks[:-1], True)  # the last write of each program
        marks, values = marks[is_last_write], values[is_last_write]
        address, program = marks >> PROGRAM_BITS, marks & PROGRAM_MASK
        conflict = (address[1:] == address[:-1]) & (values[1:] != values[:-1])
        self.views[1][address[1:][conflict] - np.uint64(PAGE)] = 0xFF
        written_tensors = np.unique(np.searchsorted(self.starts, address, side="right"))
        for size, marked in self.reads_by_size.items():
            tensors = (np.searchsorted(self.starts, marks >> PROGRAM_BITS, side="right") for marks in marked)
            relevant = [
                marks[np.isin(tensor_ids, written_tensors)]
                for marks, tensor_ids in zip(marked, tensors, strict=True)
            ]
            marks = np.unique(_each_byte(np.concatenate(relevant), size))
            read_address, reader = marks >> PROGRAM_BITS, marks & PROGRAM_MASK
            for side in ("left", "right"):  # the first and the last program that wrote there
                write_index = np.clip(
                    np.searchsorted(address, read_address, side) - (side == "right"), 0, address.size - 1
                )
                if (race := (address[write_index] == read_address) & (program[write_index] != reader)).any():
                    raise MemoryFaultError(
                        f"race at {int(read_address[race][0]):#x}: one program writes it and another reads it"
                    )


def _tag_program(addresses: Array, programs: Array) -> Array:
    """Addresses with the program index in the low bits."""
    return (addresses << PROGRAM_BITS) | programs.astype(np.uint64)


def _each_byte(marks: Array, size: int) -> Array:
    """Expand tagged addresses of `size` bytes to those of each byte."""
    return (marks[:, None] + (np.arange(size, dtype=np.uint64) << PROGRAM_BITS)).reshape(-1)


def _address_range(tensor: Tensor) -> tuple[int, int]:
    """Start and end address of a tensor."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


class LocalMemory:
    """Shared memory per program, or local memory per thread: `size` bytes, initially NaN."""

    def __init__(self, num_owners: int, size: int) -> None:
        self.size = -(-size // 16) * 16
        buffer = np.full(num_owners * self.size, 0xFF, np.uint8)
        self.views = {size: buffer.view(f"u{size}") for size in ACCESS_SIZES}

    def check(self, offsets: Array, size: int) -> None:
        if (invalid := offsets % offsets.dtype.type(size) != 0).any():
            raise MemoryFaultError(f"{size} bytes at {int(offsets[invalid][0])} are not aligned")
        if offsets.size and int(offsets.max()) + size > self.size:
            raise MemoryFaultError(f"{size} bytes at {int(offsets.max())} are beyond the size {self.size}")

    def record_reads(self, offsets: Array, owners: Array, size: int) -> None:
        """Check the accesses."""
        self.check(offsets, size)

    def load(self, offsets: Array, owners: Array, size: int) -> Array:
        return self.views[size][(owners * self.size + offsets.astype(np.int64)) // size]

    def store(self, offsets: Array, owners: Array, values: Array) -> None:
        size = values.dtype.itemsize
        self.views[size][(owners * self.size + offsets.astype(np.int64)) // size] = values
