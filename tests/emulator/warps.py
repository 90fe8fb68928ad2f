"""Warp-level PTX instructions: shuffles and reductions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from .machine import Machine
    from .ptx import Instruction

WARP_SIZE = 32
REDUCTIONS: dict[str, Any] = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


def shuffle(machine: Machine, instruction: Instruction) -> None:
    """shfl.sync: the value of another lane; a lane out of range reads its own."""
    machine.require_convergence(WARP_SIZE)
    mode, (target, source, offset, clamp, _) = instruction.opcode[2], instruction.operands
    if clamp not in ((0,) if mode == "up" else (31,)):
        raise NotImplementedError(instruction.text)
    lane, step = np.arange(WARP_SIZE), machine.per_thread(offset, "u32", WARP_SIZE).astype(np.int64)
    source_lane = {"bfly": lane ^ step, "idx": step & 31, "down": lane + step, "up": lane - step}[mode]
    source_lane = np.where((source_lane < 0) | (source_lane >= WARP_SIZE), lane, source_lane)
    values = np.take_along_axis(machine.per_thread(source, "b32", WARP_SIZE), source_lane, 1)
    machine.set(target, values.reshape(-1), "b32")


def reduce(machine: Machine, instruction: Instruction) -> None:
    """redux.sync: reduce over all lanes of a warp."""
    machine.require_convergence(WARP_SIZE)
    ptx_type, (target, source, _) = instruction.opcode[-1], instruction.operands
    reduced = REDUCTIONS[instruction.opcode[2]].reduce(
        machine.per_thread(source, ptx_type, WARP_SIZE), axis=1
    )
    machine.set(target, np.repeat(reduced, WARP_SIZE), ptx_type)
