"""Tensor cores: how a warp holds 8 x 8 matrices, and products of them (PTX ISA, 9.7.14 and 9.7.15)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .gpu_math import Array, widened
from .warps import WARP

if TYPE_CHECKING:
    from .machine import Machine
    from .ptx import Instruction, Operand

GROUP = 128
LANE = np.arange(WARP)
ROW, COLUMN = LANE // 4, 2 * (LANE % 4)
"""Where a thread's numbers are in an 8 x 8 matrix: there, and in the column after it."""


def _pairs(words: Array) -> Array:
    """The 16 bits of each half, [..., 2]."""
    return np.ascontiguousarray(words)[..., None].view(np.uint16)


def _numbers(words: Array, kind: str) -> Array:
    """Both halves as float32, [..., 2]."""
    pairs = _pairs(words)
    return pairs.view(np.float16).astype(np.float32) if kind == "f16" else widened(pairs)


def _rows(machine: Machine, instruction: Instruction, matrices: int, address: Operand) -> tuple[Array, Array]:
    """Addresses of all rows [warps, matrices, 8], and the programs of the warps that act."""
    acting = machine.together(WARP)
    at = machine.address(address, "u32").reshape(-1, WARP)[acting][:, : 8 * matrices]
    machine.shared.check(at, 16)
    return at.reshape(-1, matrices, 8), machine.own.reshape(-1, WARP)[acting, 0]


def load(machine: Machine, instruction: Instruction) -> None:
    """ldmatrix: thread 8 i + r says where row r of matrix i is."""
    targets, address = instruction.operands
    assert isinstance(targets, tuple)
    at, program = _rows(machine, instruction, len(targets), address)
    where = at[..., None] + np.arange(0, 16, 2, dtype=np.uint32)
    held = machine.shared.load(where, program[:, None, None, None], 2)
    if "trans" in instruction.opcode:
        held = held.swapaxes(-1, -2)
    for i, target in enumerate(targets):
        low, high = held[:, i, ROW, COLUMN], held[:, i, ROW, COLUMN + 1]
        _give(machine, target, low.astype(np.uint32) | (high.astype(np.uint32) << np.uint32(16)))


def store(machine: Machine, instruction: Instruction) -> None:
    """stmatrix: the other way."""
    address, sources = instruction.operands
    assert isinstance(sources, tuple)
    at, program = _rows(machine, instruction, len(sources), address)
    acting = machine.together(WARP)
    for i, source in enumerate(sources):
        pairs = _pairs(machine.every(source, "b32", WARP)[acting])
        matrix = np.zeros((len(program), 8, 8), np.uint16)
        matrix[:, ROW, COLUMN], matrix[:, ROW, COLUMN + 1] = pairs[..., 0], pairs[..., 1]
        if "trans" in instruction.opcode:
            matrix = matrix.swapaxes(-1, -2)
        where = at[:, i, :, None] + np.arange(0, 16, 2, dtype=np.uint32)
        machine.shared.store(where, program[:, None, None], np.ascontiguousarray(matrix))


def _give(machine: Machine, target: Operand, values: Array) -> None:
    """values [warps that act, 32]"""
    acting = machine.together(WARP)
    every = np.zeros((acting.size, WARP), values.dtype)
    every[acting] = values
    machine.set(target, every.reshape(-1), "f32" if values.dtype == np.float32 else "b32")


def _left(machine: Machine, operands: tuple[Operand, ...], acting: Array, kind: str) -> Array:
    """A matrix [warps, 16, 16] of four 8 x 8 ones: down, then to the right."""
    found = np.zeros((int(acting.sum()), 16, 16), np.float32)
    for i, operand in enumerate(operands):
        pairs = _numbers(machine.every(operand, "b32", WARP)[acting], kind)
        for j in range(2):
            found[:, ROW + 8 * (i % 2), COLUMN + 8 * (i // 2) + j] = pairs[..., j]
    return found


def _product(left: Array, right: Array) -> Array:
    """Of 16-bit numbers, summed in float64: wider than a tensor core, and for every row alike."""
    return left.astype(np.float64) @ right.astype(np.float64)


def multiply(machine: Machine, instruction: Instruction) -> None:
    """mma.sync.m16n8k16"""
    targets, left, right, added = instruction.operands
    assert isinstance(targets, tuple)
    assert isinstance(left, tuple)
    assert isinstance(right, tuple)
    assert isinstance(added, tuple)
    if instruction.opcode[3] != "m16n8k16":
        raise NotImplementedError(instruction.text)
    acting, kind = machine.together(WARP), instruction.opcode[-2]
    b = np.zeros((int(acting.sum()), 16, 8), np.float32)
    for i, operand in enumerate(right):
        pairs = _numbers(machine.every(operand, "b32", WARP)[acting], kind)
        for j in range(2):
            b[:, COLUMN + 8 * i + j, ROW] = pairs[..., j]
    product = _product(_left(machine, left, acting, kind), b)
    for i, (target, term) in enumerate(zip(targets, added, strict=True)):
        before = machine.every(term, "f32", WARP)[acting]
        found = product[:, ROW + 8 * (i // 2), COLUMN + i % 2] + before
        _give(machine, target, found.astype(np.float32))


def multiply_group(machine: Machine, instruction: Instruction) -> None:
    """wgmma.mma_async.m64nNk16 of four warps: B, and A or not, in shared memory; here at once."""
    if instruction.opcode[1] != "mma_async":
        return
    targets, left, right, keeps, *signs = instruction.operands
    assert isinstance(targets, tuple)
    columns, kind = int(instruction.opcode[4].split("n")[1].split("k")[0]), instruction.opcode[-1]
    if tuple(signs[:2]) != (1, 1):
        raise NotImplementedError(instruction.text)
    groups = machine.together(GROUP)
    warps = np.repeat(groups, GROUP // WARP)
    program = machine.own.reshape(-1, GROUP)[groups, 0]
    if isinstance(left, tuple):
        a = _left(machine, left, warps, kind).reshape(-1, 64, 16)
    else:
        a = _described(machine, left, groups, program, 64, bool(signs[2]), kind)
    b = _described(machine, right, groups, program, columns, bool(signs[-1]), kind)
    product = _product(a, b.swapaxes(-1, -2)).reshape(-1, 16, columns)
    adding = machine.every(keeps, "pred", WARP)[warps]
    for i, target in enumerate(targets):
        before = np.where(adding, machine.every(target, "f32", WARP)[warps], np.float32(0))
        row, column = ROW + 8 * (i % 4 // 2), 8 * (i // 4) + COLUMN + i % 2
        _give(machine, target, (product[:, row, column] + before).astype(np.float32))


def _described(
    machine: Machine, operand: Operand, groups: Array, program: Array, size: int, across: bool, kind: str
) -> Array:
    """A matrix [groups, size, 16] where a descriptor says. across: rows, not the 16, are next to each other.

    The lots of 16 in a line of 128, 64 or 32 bytes change places by the line's number, so that those of a
    column lie in several banks.
    """
    descriptors = machine.every(operand, "u64", GROUP)[groups, 0]
    found = list[Array]()
    for descriptor, own in zip(descriptors.tolist(), program, strict=True):
        start, leading, stride = (((descriptor >> shift) & 0x3FFF) << 4 for shift in (0, 16, 32))
        if (descriptor >> 49) & 7 or not descriptor >> 62:
            raise NotImplementedError(f"{descriptor:#x}: a base offset, or lines that are not permuted")
        line = 256 >> (descriptor >> 62)
        row, inner = np.arange(size)[:, None], np.arange(16)[None, :]
        if across:
            at = (2 * row) // line * leading + (2 * row) % line + inner % 8 * line + inner // 8 * stride
        else:
            at = row // 8 * stride + row % 8 * line + 2 * inner
        at = at + start
        at ^= (at >> 7 & line // 16 - 1) << 4
        found.append(machine.shared.load(at, own, 2))
    bits = np.stack(found)
    return bits.view(np.float16).astype(np.float32) if kind == "f16" else widened(bits)
