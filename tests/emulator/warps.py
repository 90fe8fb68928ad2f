"""What the 32 threads of a warp do together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from .machine import Machine
    from .ptx import Instruction

WARP = 32
REDUCTIONS: dict[str, Any] = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


def shuffle(machine: Machine, instruction: Instruction) -> None:
    """shfl.sync: the number of another thread, or the own one where there is no such thread."""
    machine.together(WARP)
    how, (target, source, by, clamp, _) = instruction.opcode[2], instruction.operands
    if clamp not in ((0,) if how == "up" else (31,)):
        raise NotImplementedError(instruction.text)
    lane, step = np.arange(WARP), machine.every(by, "u32", WARP).astype(np.int64)
    wanted = {"bfly": lane ^ step, "idx": step & 31, "down": lane + step, "up": lane - step}[how]
    wanted = np.where((wanted < 0) | (wanted >= WARP), lane, wanted)
    values = np.take_along_axis(machine.every(source, "b32", WARP), wanted, 1)
    machine.set(target, values.reshape(-1), "b32")


def reduce(machine: Machine, instruction: Instruction) -> None:
    """redux.sync: one number of all."""
    machine.together(WARP)
    kind, (target, source, _) = instruction.opcode[-1], instruction.operands
    found = REDUCTIONS[instruction.opcode[2]].reduce(machine.every(source, kind, WARP), axis=1)
    machine.set(target, np.repeat(found, WARP), kind)
