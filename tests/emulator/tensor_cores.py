"""Tensor-core instructions: 8 x 8 matrix fragments of a warp, and products (PTX ISA, 9.7.14 and 9.7.15)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .gpu_math import Array, bf16_to_f32
from .warps import WARP_SIZE

if TYPE_CHECKING:
    from .machine import Machine
    from .ptx import Instruction, Operand

WARP_GROUP = 128
LANE = np.arange(WARP_SIZE)
ROW, COLUMN = LANE // 4, 2 * (LANE % 4)
"""Row and first column of the two adjacent elements of an 8 x 8 matrix that each lane holds."""


def _half_words(words: Array) -> Array:
    """The two 16-bit halves, [..., 2]."""
    return np.ascontiguousarray(words)[..., None].view(np.uint16)


def _halves_to_f32(words: Array, kind: str) -> Array:
    """Both halves as float32, [..., 2]."""
    pairs = _half_words(words)
    return pairs.view(np.float16).astype(np.float32) if kind == "f16" else bf16_to_f32(pairs)


def _row_addresses(
    machine: Machine, instruction: Instruction, num_matrices: int, address: Operand
) -> tuple[Array, Array]:
    """Row addresses [warps, matrices, 8], and programs of the active warps."""
    warps_active = machine.require_convergence(WARP_SIZE)
    addresses = machine.address(address, "u32").reshape(-1, WARP_SIZE)[warps_active][:, : 8 * num_matrices]
    machine.shared.check(addresses, 16)
    return addresses.reshape(-1, num_matrices, 8), machine.local_program.reshape(-1, WARP_SIZE)[
        warps_active, 0
    ]


def load(machine: Machine, instruction: Instruction) -> None:
    """ldmatrix: lane 8 i + r has the address of row r of matrix i."""
    targets, address = instruction.operands
    assert isinstance(targets, tuple)
    rows, program = _row_addresses(machine, instruction, len(targets), address)
    addresses = rows[..., None] + np.arange(0, 16, 2, dtype=np.uint32)
    values = machine.shared.load(addresses, program[:, None, None, None], 2)
    if "trans" in instruction.opcode:
        values = values.swapaxes(-1, -2)
    for i, target in enumerate(targets):
        low, high = values[:, i, ROW, COLUMN], values[:, i, ROW, COLUMN + 1]
        _set_active(machine, target, low.astype(np.uint32) | (high.astype(np.uint32) << np.uint32(16)))


def store(machine: Machine, instruction: Instruction) -> None:
    """stmatrix: the inverse of `load`."""
    address, sources = instruction.operands
    assert isinstance(sources, tuple)
    rows, program = _row_addresses(machine, instruction, len(sources), address)
    warps_active = machine.require_convergence(WARP_SIZE)
    for i, source in enumerate(sources):
        pairs = _half_words(machine.per_thread(source, "b32", WARP_SIZE)[warps_active])
        matrix = np.zeros((len(program), 8, 8), np.uint16)
        matrix[:, ROW, COLUMN], matrix[:, ROW, COLUMN + 1] = pairs[..., 0], pairs[..., 1]
        if "trans" in instruction.opcode:
            matrix = matrix.swapaxes(-1, -2)
        addresses = rows[:, i, :, None] + np.arange(0, 16, 2, dtype=np.uint32)
        machine.shared.store(addresses, program[:, None, None], np.ascontiguousarray(matrix))


def _set_active(machine: Machine, target: Operand, values: Array) -> None:
    """Set a register of the active warps from values [active warps, 32]."""
    warps_active = machine.require_convergence(WARP_SIZE)
    per_warp = np.zeros((warps_active.size, WARP_SIZE), values.dtype)
    per_warp[warps_active] = values
    machine.set(target, per_warp.reshape(-1), "f32" if values.dtype == np.float32 else "b32")


def _gather_a(machine: Machine, operands: tuple[Operand, ...], warps_active: Array, kind: str) -> Array:
    """Assemble [warps, 16, 16] from four 8 x 8 fragments in column-major order."""
    matrix = np.zeros((int(warps_active.sum()), 16, 16), np.float32)
    for i, operand in enumerate(operands):
        pairs = _halves_to_f32(machine.per_thread(operand, "b32", WARP_SIZE)[warps_active], kind)
        for j in range(2):
            matrix[:, ROW + 8 * (i % 2), COLUMN + 8 * (i // 2) + j] = pairs[..., j]
    return matrix


def _matmul(a: Array, b: Array) -> Array:
    """Product of 16-bit values, summed in float64: wider than a tensor core, and the same for all rows."""
    return a.astype(np.float64) @ b.astype(np.float64)


def mma(machine: Machine, instruction: Instruction) -> None:
    """mma.sync.m16n8k16"""
    targets, a_operands, b_operands, c_operands = instruction.operands
    assert isinstance(targets, tuple)
    assert isinstance(a_operands, tuple)
    assert isinstance(b_operands, tuple)
    assert isinstance(c_operands, tuple)
    if instruction.opcode[3] != "m16n8k16":
        raise NotImplementedError(instruction.text)
    warps_active, kind = machine.require_convergence(WARP_SIZE), instruction.opcode[-2]
    b = np.zeros((int(warps_active.sum()), 16, 8), np.float32)
    for i, operand in enumerate(b_operands):
        pairs = _halves_to_f32(machine.per_thread(operand, "b32", WARP_SIZE)[warps_active], kind)
        for j in range(2):
            b[:, COLUMN + 8 * i + j, ROW] = pairs[..., j]
    product = _matmul(_gather_a(machine, a_operands, warps_active, kind), b)
    for i, (target, operand_c) in enumerate(zip(targets, c_operands, strict=True)):
        accumulator = machine.per_thread(operand_c, "f32", WARP_SIZE)[warps_active]
        total = product[:, ROW + 8 * (i // 2), COLUMN + i % 2] + accumulator
        _set_active(machine, target, total.astype(np.float32))


def wgmma(machine: Machine, instruction: Instruction) -> None:
    """wgmma.mma_async.m64nNk16 of four warps, run synchronously; B, and optionally A, in shared memory."""
    if instruction.opcode[1] != "mma_async":
        return
    targets, a_operand, b_operand, scale_d, *signs = instruction.operands
    assert isinstance(targets, tuple)
    columns, kind = int(instruction.opcode[4].split("n")[1].split("k")[0]), instruction.opcode[-1]
    if tuple(signs[:2]) != (1, 1):
        raise NotImplementedError(instruction.text)
    groups = machine.require_convergence(WARP_GROUP)
    warps = np.repeat(groups, WARP_GROUP // WARP_SIZE)
    program = machine.local_program.reshape(-1, WARP_GROUP)[groups, 0]
    if isinstance(a_operand, tuple):
        a = _gather_a(machine, a_operand, warps, kind).reshape(-1, 64, 16)
    else:
        a = _load_descriptor(machine, a_operand, groups, program, 64, bool(signs[2]), kind)
    b = _load_descriptor(machine, b_operand, groups, program, columns, bool(signs[-1]), kind)
    product = _matmul(a, b.swapaxes(-1, -2)).reshape(-1, 16, columns)
    accumulate = machine.per_thread(scale_d, "pred", WARP_SIZE)[warps]
    for i, target in enumerate(targets):
        accumulator = np.where(accumulate, machine.per_thread(target, "f32", WARP_SIZE)[warps], np.float32(0))
        row, column = ROW + 8 * (i % 4 // 2), 8 * (i // 4) + COLUMN + i % 2
        _set_active(machine, target, (product[:, row, column] + accumulator).astype(np.float32))


def _load_descriptor(
    machine: Machine,
    operand: Operand,
    groups: Array,
    program: Array,
    num_rows: int,
    transposed: bool,
    kind: str,
) -> Array:
    """Load [groups, num_rows, 16] by a shared-memory descriptor. transposed: adjacent rows are contiguous.

    16-byte chunks are swizzled within lines of 128, 64 or 32 bytes, by the line number, so that a column is
    spread over several banks.
    """
    descriptors = machine.per_thread(operand, "u64", WARP_GROUP)[groups, 0]
    matrices = list[Array]()
    for descriptor, program_id in zip(descriptors.tolist(), program, strict=True):
        start, leading, stride = (((descriptor >> shift) & 0x3FFF) << 4 for shift in (0, 16, 32))
        if (descriptor >> 49) & 7 or not descriptor >> 62:
            raise NotImplementedError(f"descriptor {descriptor:#x} with a base offset or without swizzling")
        line_bytes = 256 >> (descriptor >> 62)
        row, k = np.arange(num_rows)[:, None], np.arange(16)[None, :]
        if transposed:
            addresses = (
                (2 * row) // line_bytes * leading
                + (2 * row) % line_bytes
                + k % 8 * line_bytes
                + k // 8 * stride
            )
        else:
            addresses = row // 8 * stride + row % 8 * line_bytes + 2 * k
        addresses = addresses + start
        addresses ^= (addresses >> 7 & line_bytes // 16 - 1) << 4
        matrices.append(machine.shared.load(addresses, program_id, 2))
    bits = np.stack(matrices)
    return bits.view(np.float16).astype(np.float32) if kind == "f16" else bf16_to_f32(bits)
