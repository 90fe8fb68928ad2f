"""The threads of some programs, which carry out a kernel's instructions together.

Every thread has its own place among the blocks. Those that are the furthest back go on, all at once: blocks
are in an order in which threads that went apart meet again. What a warp or a program does together needs all
of its threads there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import numpy as np

from . import load_store, tensor_cores, warps
from .arithmetic import TYPES
from .gpu_math import Array
from .memory import FaultError, Scratch, Tensors
from .ptx import Address, Instruction, Kernel, Operand

REGISTERS = {"%p": "pred", "%rs": "b16", "%r": "b32", "%rd": "b64", "%SP": "b64", "%SPL": "b32"}
NOTHING = {"fence", "membar"}
"""What orders memory, which here is always in order."""


class Machine:
    """Some programs of a launch.

    params: the parameters' bits, by name. grid: its size on each axis. programs: their places in it
    [programs, 3], after the `first` ones. shared: bytes of shared memory.
    """

    def __init__(
        self,
        kernel: Kernel,
        tensors: Tensors,
        params: Mapping[str, int],
        grid: Sequence[int],
        programs: Array,
        first: int,
        shared: int,
    ) -> None:
        self.kernel, self.tensors, self.params, self.threads = kernel, tensors, params, kernel.threads
        count = len(programs)
        self.size = count * self.threads
        self.own = np.repeat(np.arange(count), self.threads)
        """Each thread's program, among those that run here."""
        self.program = self.own + first
        self.shared = Scratch(count, shared)
        self.local = Scratch(self.size, kernel.local)
        self.registers = self._special(grid, programs)
        self.place = np.zeros(self.size, np.int64)
        self.acting = np.ones(self.size, bool)
        self.issued = 0
        """Instructions so far, each once for every warp."""

    def _special(self, grid: Sequence[int], programs: Array) -> dict[str, Array]:
        """Registers that nothing writes, and what stands where memory begins."""
        found = dict.fromkeys(("global_smem", "__local_depot0"), np.zeros(self.size, np.uint32))
        for axis, name in enumerate("xyz"):
            own = np.arange(self.size) % self.threads if axis == 0 else np.zeros(self.size)
            found[f"%tid.{name}"] = own.astype(np.uint32)
            found[f"%ctaid.{name}"] = np.repeat(programs[:, axis], self.threads).astype(np.uint32)
            found[f"%nctaid.{name}"] = np.full(self.size, grid[axis], np.uint32)
        return found

    def run(self) -> None:
        """Until every thread has returned."""
        end = len(self.kernel.blocks)
        with np.errstate(all="ignore"):
            while (block := int(self.place.min())) < end:
                here = self.place == block
                self.place[here] = self.kernel.following[block]
                self.issued += int(here.reshape(-1, warps.WARP).any(1).sum()) * self.kernel.issued[block]
                for instruction in self.kernel.blocks[block]:
                    self.acting = here
                    if instruction.guard is not None:
                        self.acting = here & (self.get(instruction.guard, "pred") != instruction.unless)
                    try:
                        self._do(instruction)
                    except FaultError as fault:
                        raise FaultError(f"{fault}, in {instruction.text!r}") from None

    def _do(self, instruction: Instruction) -> None:
        operation, operands = instruction.operation, instruction.operands
        if operation is not None:
            sources = [self.get(one, kind) for one, kind in zip(operands[1:], operation.sources, strict=True)]
            self.set(operands[0], operation.function(*sources), operation.result)
        elif (name := instruction.opcode[0]) in ACTIONS:
            ACTIONS[name](self, instruction)
        elif name not in NOTHING:
            raise NotImplementedError(instruction.text)

    def get(self, operand: Operand, kind: str) -> Array:
        """A number of that type for each thread, or one for all."""
        dtype = TYPES[kind]
        if isinstance(operand, int):
            return _constant(operand, dtype)
        assert isinstance(operand, str)
        found = self.registers.get(operand)
        if found is None:
            return _constant(-1, dtype)  # undefined: NaN
        if found.itemsize != dtype.itemsize:
            found = found.astype(f"u{dtype.itemsize}")
        return found.view(dtype)

    def every(self, operand: Operand, kind: str, together: int = 1) -> Array:
        """The same, [threads / together, together]."""
        return np.broadcast_to(self.get(operand, kind), self.size).reshape(-1, together)

    def set(self, operand: Operand, value: Array, kind: str) -> None:
        """Of the threads that act; `value` is nobody else's. What is narrower is extended by its type."""
        assert isinstance(operand, str)
        named = REGISTERS.get(operand.rstrip("0123456789"), kind)  # inline code has registers of its own
        width = TYPES[named]
        value = np.asarray(value, TYPES[kind])
        if value.itemsize < width.itemsize:
            value = value.astype(f"{'i' if value.dtype.kind == 'i' else 'u'}{width.itemsize}")
        value = value.view(width)
        if value.shape == self.acting.shape and self.acting.all():
            self.registers[operand] = value
            return
        held = self.registers.get(operand)
        if held is None:
            held = self.registers[operand] = np.full(self.size, _constant(-1, width))
        np.copyto(held, value, where=self.acting)

    def address(self, operand: Operand, kind: str) -> Array:
        """Of each thread."""
        assert isinstance(operand, Address)
        return self.every(operand.base, kind)[:, 0] + TYPES[kind].type(operand.offset)

    def together(self, count: int) -> Array:
        """Which lots of so many threads act, each as a whole."""
        lots = self.acting.reshape(-1, count)
        if (lots.any(1) != lots.all(1)).any():
            raise FaultError(f"only some of {count} threads are there")
        return lots.all(1)


@cache
def _constant(bits: int, dtype: Any) -> Array:
    """A number that a text spells, or that has these bits."""
    if dtype == np.bool_:
        return np.array(bits != 0)
    return np.array(bits & (1 << 8 * dtype.itemsize) - 1, f"u{dtype.itemsize}").view(dtype)


def _pack(machine: Machine, instruction: Instruction) -> None:
    """mov between a register and the parts of it."""
    (target, source), kind = instruction.operands, instruction.opcode[-1]
    parts = target if isinstance(target, tuple) else source
    assert isinstance(parts, tuple)
    width, dtype = int(kind[1:]) // len(parts), TYPES[kind]
    if isinstance(source, tuple):
        pieces = [machine.every(part, f"b{width}")[:, 0].astype(dtype) for part in source]
        shifted = [piece << dtype.type(width * i) for i, piece in enumerate(pieces)]
        machine.set(target, np.bitwise_or.reduce(shifted), kind)
        return
    whole = machine.get(source, kind)
    for i, part in enumerate(parts):
        machine.set(part, (whole >> dtype.type(width * i)).astype(TYPES[f"b{width}"]), f"b{width}")


def _branch(machine: Machine, instruction: Instruction) -> None:
    machine.place[machine.acting] = machine.kernel.labels[str(instruction.operands[-1])]


def _return(machine: Machine, instruction: Instruction) -> None:
    machine.place[machine.acting] = len(machine.kernel.blocks)


def _barrier(machine: Machine, instruction: Instruction) -> None:
    """bar.sync of a program, whose threads that returned need not come, or bar.warp.sync."""
    if instruction.opcode[1] == "warp":
        machine.together(warps.WARP)
        return
    if instruction.opcode != ("bar", "sync") or len(instruction.operands) != 1:
        raise NotImplementedError(instruction.text)
    returned = machine.place == len(machine.kernel.blocks)
    waits = (machine.acting | returned).reshape(-1, machine.threads).all(1)
    if (machine.acting.reshape(-1, machine.threads).any(1) & ~waits).any():
        raise FaultError("a program's threads are not all at the barrier")


ACTIONS: dict[str, Callable[[Machine, Instruction], None]] = {
    "mov": _pack,
    "bra": _branch,
    "ret": _return,
    "bar": _barrier,
    "ld": load_store.load,
    "st": load_store.store,
    "cp": load_store.copy,
    "cvta": load_store.placed,
    "shfl": warps.shuffle,
    "redux": warps.reduce,
    "ldmatrix": tensor_cores.load,
    "stmatrix": tensor_cores.store,
    "mma": tensor_cores.multiply,
    "wgmma": tensor_cores.multiply_group,
}
