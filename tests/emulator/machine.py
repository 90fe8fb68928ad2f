"""SIMT execution of a kernel's basic blocks, for all threads of several programs at once.

Every thread has a block index. The threads with the lowest index always run next, together: in the order of
the blocks diverged threads reconverge. Instructions of a warp or a program require all of its threads.
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
"""Memory fences; memory is always in order here."""


class Machine:
    """Execution state of consecutive programs of a launch.

    params: parameter bits, by name. grid: size on each axis. programs: grid coordinates [programs, 3].
    first_program: index of the first in the launch. shared: bytes of shared memory per program.
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
        """Each thread's program, as an index into `programs`."""
        self.program_id = self.local_program + first_program
        self.shared = LocalMemory(num_programs, shared)
        self.local = LocalMemory(self.num_threads, kernel.local_bytes)
        self.registers = self._special_registers(grid, programs)
        self.block_of_thread = np.zeros(self.num_threads, np.int64)
        self.active = np.ones(self.num_threads, bool)
        self.num_issued = 0
        """Number of warp instructions executed."""

    def _special_registers(self, grid: Sequence[int], programs: Array) -> dict[str, Array]:
        """Read-only special registers, and the base addresses of shared and local memory."""
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
        """Run until every thread has returned."""
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
        """The operand as `ptx_type`, per thread or as a scalar for all."""
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
        """Like `get`, broadcast to [threads / group_size, group_size]."""
        return np.broadcast_to(self.get(operand, ptx_type), self.num_threads).reshape(-1, group_size)

    def set(self, operand: Operand, value: Array, ptx_type: str) -> None:
        """Set a register of the active threads, taking ownership of `value`; narrower types are extended."""
        assert isinstance(operand, str)
        # inline assembly declares other register names
        register_type = REGISTER_TYPES.get(operand.rstrip("0123456789"), ptx_type)
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
        """The address of a memory operand, per thread."""
        assert isinstance(operand, Address)
        return self.per_thread(operand.base, ptx_type)[:, 0] + PTX_DTYPES[ptx_type].type(operand.offset)

    def require_convergence(self, group_size: int) -> Array:
        """Which groups of `group_size` threads are active; raises if only part of a group is."""
        groups = self.active.reshape(-1, group_size)
        if (groups.any(1) != groups.all(1)).any():
            raise MemoryFaultError(f"only some of a group of {group_size} threads are active")
        return groups.all(1)


@cache
def _constant_array(bits: int, dtype: Any) -> Array:
    """A 0-d array of `dtype` with the given bits."""
    if dtype == np.bool_:
        return np.array(bits != 0)
    return np.array(bits & (1 << 8 * dtype.itemsize) - 1, f"u{dtype.itemsize}").view(dtype)


def _pack(machine: Machine, instruction: Instruction) -> None:
    """mov that packs or unpacks a register vector."""
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
    """bar.sync of a program, without the threads that have returned, or bar.warp.sync."""
    if instruction.opcode[1] == "warp":
        machine.require_convergence(warps.WARP_SIZE)
        return
    if instruction.opcode != ("bar", "sync") or len(instruction.operands) != 1:
        raise NotImplementedError(instruction.text)
    exited = machine.block_of_thread == len(machine.kernel.blocks)
    all_arrived = (machine.active | exited).reshape(-1, machine.threads_per_program).all(1)
    if (machine.active.reshape(-1, machine.threads_per_program).any(1) & ~all_arrived).any():
        raise MemoryFaultError("only some threads of a program reached the barrier")


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
