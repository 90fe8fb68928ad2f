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
from .arithmetic import PTX_DTYPES
from .gpu_math import Array
from .memory import GlobalMemory, LocalMemory, MemoryFaultError
from .ptx import Address, Instruction, Kernel, Operand

REGISTER_TYPES = {"%p": "pred", "%rs": "b16", "%r": "b32", "%rd": "b64", "%SP": "b64", "%SPL": "b32"}
NO_OPS = {"fence", "membar"}
"""What orders memory, which here is always in order."""


class Machine:
    """Some programs of a launch.

    params: the parameters' bits, by name. grid: its size on each axis. programs: their places in it
    [programs, 3], after the `first` ones. shared: bytes of shared memory.
    """

    def __init__(
        self,
        kernel: Kernel,
        tensors: GlobalMemory,
        params: Mapping[str, int],
        grid: Sequence[int],
        programs: Array,
        first_program: int,
        shared: int,
    ) -> None:
        self.kernel, self.tensors, self.params, self.threads_per_program = (
            kernel,
            tensors,
            params,
            kernel.threads,
        )
        num_programs = len(programs)
        self.num_threads = num_programs * self.threads_per_program
        self.local_program = np.repeat(np.arange(num_programs), self.threads_per_program)
        """Each thread's program, among those that run here."""
        self.program_id = self.local_program + first_program
        self.shared = LocalMemory(num_programs, shared)
        self.local = LocalMemory(self.num_threads, kernel.local_bytes)
        self.registers = self._special_registers(grid, programs)
        self.block_of_thread = np.zeros(self.num_threads, np.int64)
        self.active = np.ones(self.num_threads, bool)
        self.num_issued = 0
        """Instructions so far, each once for every warp."""

    def _special_registers(self, grid: Sequence[int], programs: Array) -> dict[str, Array]:
        """Registers that nothing writes, and what stands where memory begins."""
        registers = dict.fromkeys(("global_smem", "__local_depot0"), np.zeros(self.num_threads, np.uint32))
        for axis, name in enumerate("xyz"):
            thread_id = (
                np.arange(self.num_threads) % self.threads_per_program
                if axis == 0
                else np.zeros(self.num_threads)
            )
            registers[f"%tid.{name}"] = thread_id.astype(np.uint32)
            registers[f"%ctaid.{name}"] = np.repeat(programs[:, axis], self.threads_per_program).astype(
                np.uint32
            )
            registers[f"%nctaid.{name}"] = np.full(self.num_threads, grid[axis], np.uint32)
        return registers

    def run(self) -> None:
        """Until every thread has returned."""
        end = len(self.kernel.blocks)
        with np.errstate(all="ignore"):
            while (block := int(self.block_of_thread.min())) < end:
                at_block = self.block_of_thread == block
                self.block_of_thread[at_block] = self.kernel.fallthrough[block]
                self.num_issued += (
                    int(at_block.reshape(-1, warps.WARP_SIZE).any(1).sum()) * self.kernel.issue_counts[block]
                )
                for instruction in self.kernel.blocks[block]:
                    self.active = at_block
                    if instruction.guard is not None:
                        self.active = at_block & (
                            self.get(instruction.guard, "pred") != instruction.guard_negated
                        )
                    try:
                        self._execute(instruction)
                    except MemoryFaultError as fault:
                        raise MemoryFaultError(f"{fault}, in {instruction.text!r}") from None

    def _execute(self, instruction: Instruction) -> None:
        operation, operands = instruction.operation, instruction.operands
        if operation is not None:
            sources = [
                self.get(operand, kind)
                for operand, kind in zip(operands[1:], operation.source_types, strict=True)
            ]
            self.set(operands[0], operation.function(*sources), operation.result_type)
        elif (name := instruction.opcode[0]) in ACTIONS:
            ACTIONS[name](self, instruction)
        elif name not in NO_OPS:
            raise NotImplementedError(instruction.text)

    def get(self, operand: Operand, ptx_type: str) -> Array:
        """A number of that type for each thread, or one for all."""
        dtype = PTX_DTYPES[ptx_type]
        if isinstance(operand, int):
            return _constant_array(operand, dtype)
        assert isinstance(operand, str)
        value = self.registers.get(operand)
        if value is None:
            return _constant_array(-1, dtype)  # undefined: NaN
        if value.itemsize != dtype.itemsize:
            value = value.astype(f"u{dtype.itemsize}")
        return value.view(dtype)

    def per_thread(self, operand: Operand, ptx_type: str, group_size: int = 1) -> Array:
        """The same, [threads / together, together]."""
        return np.broadcast_to(self.get(operand, ptx_type), self.num_threads).reshape(-1, group_size)

    def set(self, operand: Operand, value: Array, ptx_type: str) -> None:
        """Of the threads that act; `value` is nobody else's. What is narrower is extended by its type."""
        assert isinstance(operand, str)
        register_type = REGISTER_TYPES.get(
            operand.rstrip("0123456789"), ptx_type
        )  # inline code has registers of its own
        dtype = PTX_DTYPES[register_type]
        value = np.asarray(value, PTX_DTYPES[ptx_type])
        if value.itemsize < dtype.itemsize:
            value = value.astype(f"{'i' if value.dtype.kind == 'i' else 'u'}{dtype.itemsize}")
        value = value.view(dtype)
        if value.shape == self.active.shape and self.active.all():
            self.registers[operand] = value
            return
        register = self.registers.get(operand)
        if register is None:
            register = self.registers[operand] = np.full(self.num_threads, _constant_array(-1, dtype))
        np.copyto(register, value, where=self.active)

    def address(self, operand: Operand, ptx_type: str) -> Array:
        """Of each thread."""
        assert isinstance(operand, Address)
        return self.per_thread(operand.base, ptx_type)[:, 0] + PTX_DTYPES[ptx_type].type(operand.offset)

    def require_convergence(self, group_size: int) -> Array:
        """Which lots of so many threads act, each as a whole."""
        groups = self.active.reshape(-1, group_size)
        if (groups.any(1) != groups.all(1)).any():
            raise MemoryFaultError(f"only some of {group_size} threads are there")
        return groups.all(1)


@cache
def _constant_array(bits: int, dtype: Any) -> Array:
    """A number that a text spells, or that has these bits."""
    if dtype == np.bool_:
        return np.array(bits != 0)
    return np.array(bits & (1 << 8 * dtype.itemsize) - 1, f"u{dtype.itemsize}").view(dtype)


def _pack(machine: Machine, instruction: Instruction) -> None:
    """mov between a register and the parts of it."""
    (target, source), kind = instruction.operands, instruction.opcode[-1]
    registers = target if isinstance(target, tuple) else source
    assert isinstance(registers, tuple)
    width, dtype = int(kind[1:]) // len(registers), PTX_DTYPES[kind]
    if isinstance(source, tuple):
        values = [machine.per_thread(register, f"b{width}")[:, 0].astype(dtype) for register in source]
        shifted = [piece << dtype.type(width * i) for i, piece in enumerate(values)]
        machine.set(target, np.bitwise_or.reduce(shifted), kind)
        return
    value = machine.get(source, kind)
    for i, part in enumerate(registers):
        machine.set(part, (value >> dtype.type(width * i)).astype(PTX_DTYPES[f"b{width}"]), f"b{width}")


def _branch(machine: Machine, instruction: Instruction) -> None:
    machine.block_of_thread[machine.active] = machine.kernel.labels[str(instruction.operands[-1])]


def _return(machine: Machine, instruction: Instruction) -> None:
    machine.block_of_thread[machine.active] = len(machine.kernel.blocks)


def _barrier(machine: Machine, instruction: Instruction) -> None:
    """bar.sync of a program, whose threads that returned need not come, or bar.warp.sync."""
    if instruction.opcode[1] == "warp":
        machine.require_convergence(warps.WARP_SIZE)
        return
    if instruction.opcode != ("bar", "sync") or len(instruction.operands) != 1:
        raise NotImplementedError(instruction.text)
    exited = machine.block_of_thread == len(machine.kernel.blocks)
    all_arrived = (machine.active | exited).reshape(-1, machine.threads_per_program).all(1)
    if (machine.active.reshape(-1, machine.threads_per_program).any(1) & ~all_arrived).any():
        raise MemoryFaultError("a program's threads are not all at the barrier")


ACTIONS: dict[str, Callable[[Machine, Instruction], None]] = {
    "mov": _pack,
    "bra": _branch,
    "ret": _return,
    "bar": _barrier,
    "ld": load_store.load,
    "st": load_store.store,
    "cp": load_store.cp_async,
    "cvta": load_store.cvta_local,
    "shfl": warps.shuffle,
    "redux": warps.reduce,
    "ldmatrix": tensor_cores.load,
    "stmatrix": tensor_cores.store,
    "mma": tensor_cores.mma,
    "wgmma": tensor_cores.wgmma,
}
