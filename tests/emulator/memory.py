"""What threads read and write: the tensors of a launch, where they are in this process, and shared memory."""

from __future__ import annotations

import ctypes
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from .gpu_math import Array

PAGE = 1 << 12
ADDRESS_SPACE = (1 << 47) - PAGE
"""Addresses that a process has."""
PROGRAM_BITS, PROGRAM_MASK = np.uint64(16), np.uint64(0xFFFF)
"""Bits that tell programs of a launch apart."""
ACCESS_SIZES = (1, 2, 4, 8)


class MemoryFaultError(Exception):
    """A thread did what a GPU would trap at, or what has no defined result."""


class GlobalMemory:
    """Memory by the addresses of this process, of which only given tensors may be touched.

    After a launch `check_races` looks at what several programs did to the same bytes.
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
        """What was read, by its size, and bytes that were written, with their values; see `_marked`."""

    def check(self, addresses: Array, size: int) -> None:
        """Whether threads may touch so many bytes there."""
        if (invalid := addresses % np.uint64(size) != 0).any():
            raise MemoryFaultError(f"{size} bytes at {int(addresses[invalid][0]):#x} are not aligned")
        tensor_index = np.searchsorted(self.starts, addresses, side="right") - 1
        if (
            invalid := (tensor_index < 0)
            | (addresses + np.uint64(size) > self.ends[np.maximum(tensor_index, 0)])
        ).any():
            raise MemoryFaultError(
                f"{size} bytes at {int(addresses[invalid][0]):#x} are in no tensor of the launch"
            )

    def record_reads(self, addresses: Array, programs: Array, size: int) -> None:
        """Checks that threads may, and notes that they do."""
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
        """Raises FaultError where one program wrote and another read; NaN where two wrote differently."""
        if not self.writes:
            return
        marks, values = np.concatenate(self.writes, 1)
        order = np.argsort(marks, kind="stable")
        marks, values = marks[order], values[order]
        is_last_write = np.append(marks[1:] != marks[:-1], True)  # what a program wrote last
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
            for side in ("left", "right"):  # the first program that wrote there, and the last
                write_index = np.clip(
                    np.searchsorted(address, read_address, side) - (side == "right"), 0, address.size - 1
                )
                if (race := (address[write_index] == read_address) & (program[write_index] != reader)).any():
                    raise MemoryFaultError(
                        f"what one program wrote at {int(read_address[race][0]):#x} another reads"
                    )


def _tag_program(addresses: Array, programs: Array) -> Array:
    """Addresses, with the program in their lower bits."""
    return (addresses << PROGRAM_BITS) | programs.astype(np.uint64)


def _each_byte(marks: Array, size: int) -> Array:
    """Of lots of so many bytes, each byte's."""
    return (marks[:, None] + (np.arange(size, dtype=np.uint64) << PROGRAM_BITS)).reshape(-1)


def _address_range(tensor: Tensor) -> tuple[int, int]:
    """Where a tensor begins, and where it ends."""
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


class LocalMemory:
    """Memory of each program's, or each thread's, own: `size` bytes, NaN until something is written."""

    def __init__(self, num_owners: int, size: int) -> None:
        self.size = -(-size // 16) * 16
        buffer = np.full(num_owners * self.size, 0xFF, np.uint8)
        self.views = {size: buffer.view(f"u{size}") for size in ACCESS_SIZES}

    def check(self, offsets: Array, size: int) -> None:
        if (invalid := offsets % offsets.dtype.type(size) != 0).any():
            raise MemoryFaultError(f"{size} bytes at {int(offsets[invalid][0])} are not aligned")
        if offsets.size and int(offsets.max()) + size > self.size:
            raise MemoryFaultError(f"{size} bytes at {int(offsets.max())} are past {self.size}")

    def record_reads(self, offsets: Array, owners: Array, size: int) -> None:
        """Checks that threads may."""
        self.check(offsets, size)

    def load(self, offsets: Array, owners: Array, size: int) -> Array:
        return self.views[size][(owners * self.size + offsets.astype(np.int64)) // size]

    def store(self, offsets: Array, owners: Array, values: Array) -> None:
        size = values.dtype.itemsize
        self.views[size][(owners * self.size + offsets.astype(np.int64)) // size] = values
