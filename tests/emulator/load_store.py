"""PTX instructions that move data between registers and memory: ld, st, cp.async, cvta."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .arithmetic import PTX_DTYPES
from .gpu_math import Array
from .memory import GlobalMemory, LocalMemory
from .ptx import Address

if TYPE_CHECKING:
    from .machine import Machine
    from .ptx import Instruction, Operand

LOCAL_BASE = np.uint64(1 << 62)
"""Start of local memory in the generic address space."""


def _as_tuple(operand: Operand) -> tuple[Operand, ...]:
    return operand if isinstance(operand, tuple) else (operand,)


def _resolve(
    machine: Machine, instruction: Instruction, operand: Operand
) -> tuple[GlobalMemory | LocalMemory, Array, Array]:
    """(memory, addresses, owners) of an operand for the active threads."""
    space, active = instruction.opcode[1], machine.active
    if space.startswith("shared"):
        return machine.shared, machine.address(operand, "u32")[active], machine.local_program[active]
    addresses = machine.address(operand, "u64")[active]
    if space != "global" and addresses.size and addresses.min() >= LOCAL_BASE:
        return machine.local, addresses - LOCAL_BASE, np.flatnonzero(active)
    return machine.tensors, addresses, machine.program_id[active]


def load(machine: Machine, instruction: Instruction) -> None:
    """ld, scalar or vector."""
    ptx_type, (target, source) = instruction.opcode[-1], instruction.operands
    raw, targets = np.dtype(f"u{PTX_DTYPES[ptx_type].itemsize}"), _as_tuple(target)
    if instruction.opcode[1] == "param":
        assert isinstance(source, Address)
        bits = machine.params[source.base] & (1 << 8 * raw.itemsize) - 1
        machine.set(targets[0], np.array([bits], raw).view(PTX_DTYPES[ptx_type]), ptx_type)
        return
    memory, addresses, owners = _resolve(machine, instruction, source)
    memory.record_reads(addresses, owners, raw.itemsize * len(targets))
    for i, register in enumerate(targets):
        values = np.zeros(machine.num_threads, raw)
        values[machine.active] = memory.load(
            addresses + addresses.dtype.type(i * raw.itemsize), owners, raw.itemsize
        )
        machine.set(register, values.view(PTX_DTYPES[ptx_type]), ptx_type)


def store(machine: Machine, instruction: Instruction) -> None:
    """st, scalar or vector."""
    ptx_type, (target, source) = instruction.opcode[-1], instruction.operands
    width, sources = PTX_DTYPES[ptx_type].itemsize, _as_tuple(source)
    memory, addresses, owners = _resolve(machine, instruction, target)
    memory.check(addresses, width * len(sources))
    for i, register in enumerate(sources):
        values = machine.per_thread(register, ptx_type)[machine.active, 0]
        memory.store(addresses + addresses.dtype.type(i * width), owners, values.view(f"u{width}"))


def cp_async(machine: Machine, instruction: Instruction) -> None:
    """cp.async to shared memory, executed synchronously; writes zeros if the source size is 0."""
    if instruction.opcode[2] in {"commit_group", "wait_group"}:
        return
    target, source, size, *optional = instruction.operands
    assert isinstance(size, int)
    active = machine.active
    length = machine.per_thread(optional[0] if optional else size, "u32")[:, 0]
    if not np.isin(length[active], (0, size)).all():
        raise NotImplementedError(instruction.text)
    reads_source = active & (length > 0)
    dst, src = machine.address(target, "u32")[active], machine.address(source, "u64")[reads_source]
    machine.tensors.record_reads(src, machine.program_id[reads_source], size)
    machine.shared.check(dst, size)
    values = np.zeros(machine.num_threads, np.uint32)
    for step in range(0, size, 4):
        values[reads_source] = machine.tensors.load(
            src + np.uint64(step), machine.program_id[reads_source], 4
        )
        machine.shared.store(dst + np.uint32(step), machine.local_program[active], values[active])


def cvta_local(machine: Machine, instruction: Instruction) -> None:
    """cvta.local: convert an address in local memory to a generic address."""
    target, source = instruction.operands
    machine.set(target, machine.get(source, "u64") + LOCAL_BASE, "u64")
