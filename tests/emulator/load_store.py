"""What threads move between registers and memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .arithmetic import TYPES
from .gpu_math import Array
from .memory import Scratch, Tensors
from .ptx import Address

if TYPE_CHECKING:
    from .machine import Machine
    from .ptx import Instruction, Operand

LOCAL = np.uint64(1 << 62)
"""Where a thread's own memory is among all addresses."""


def _listed(operand: Operand) -> tuple[Operand, ...]:
    return operand if isinstance(operand, tuple) else (operand,)


def _memory(
    machine: Machine, instruction: Instruction, operand: Operand
) -> tuple[Tensors | Scratch, Array, Array]:
    """Where something is, addresses there, and whose they are, of the threads that act."""
    space, acting = instruction.opcode[1], machine.acting
    if space.startswith("shared"):
        return machine.shared, machine.address(operand, "u32")[acting], machine.own[acting]
    at = machine.address(operand, "u64")[acting]
    if space != "global" and at.size and at.min() >= LOCAL:
        return machine.local, at - LOCAL, np.flatnonzero(acting)
    return machine.tensors, at, machine.program[acting]


def load(machine: Machine, instruction: Instruction) -> None:
    """ld, of one register or a vector of them."""
    kind, (target, source) = instruction.opcode[-1], instruction.operands
    raw, targets = np.dtype(f"u{TYPES[kind].itemsize}"), _listed(target)
    if instruction.opcode[1] == "param":
        assert isinstance(source, Address)
        bits = machine.params[source.base] & (1 << 8 * raw.itemsize) - 1
        machine.set(targets[0], np.array([bits], raw).view(TYPES[kind]), kind)
        return
    memory, at, owners = _memory(machine, instruction, source)
    memory.reads(at, owners, raw.itemsize * len(targets))
    for i, one in enumerate(targets):
        found = np.zeros(machine.size, raw)
        found[machine.acting] = memory.load(at + at.dtype.type(i * raw.itemsize), owners, raw.itemsize)
        machine.set(one, found.view(TYPES[kind]), kind)


def store(machine: Machine, instruction: Instruction) -> None:
    """st, of one register or a vector of them."""
    kind, (target, source) = instruction.opcode[-1], instruction.operands
    width, sources = TYPES[kind].itemsize, _listed(source)
    memory, at, owners = _memory(machine, instruction, target)
    memory.check(at, width * len(sources))
    for i, one in enumerate(sources):
        values = machine.every(one, kind)[machine.acting, 0]
        memory.store(at + at.dtype.type(i * width), owners, values.view(f"u{width}"))


def copy(machine: Machine, instruction: Instruction) -> None:
    """cp.async: to shared memory, or zeros where the bytes to be read are none; here at once."""
    if instruction.opcode[2] in {"commit_group", "wait_group"}:
        return
    target, source, size, *given = instruction.operands
    assert isinstance(size, int)
    acting = machine.acting
    length = machine.every(given[0] if given else size, "u32")[:, 0]
    if not np.isin(length[acting], (0, size)).all():
        raise NotImplementedError(instruction.text)
    reads = acting & (length > 0)
    to, at = machine.address(target, "u32")[acting], machine.address(source, "u64")[reads]
    machine.tensors.reads(at, machine.program[reads], size)
    machine.shared.check(to, size)
    values = np.zeros(machine.size, np.uint32)
    for step in range(0, size, 4):
        values[reads] = machine.tensors.load(at + np.uint64(step), machine.program[reads], 4)
        machine.shared.store(to + np.uint32(step), machine.own[acting], values[acting])


def placed(machine: Machine, instruction: Instruction) -> None:
    """cvta.local: where something in a thread's own memory is among all addresses."""
    target, source = instruction.operands
    machine.set(target, machine.get(source, "u64") + LOCAL, "u64")
