"""PTX parser: the text of a compiled kernel to basic blocks of instructions (NVIDIA PTX ISA 9)."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from .arithmetic import Operation, make_operation
from .control_flow import reconvergence_order

TERMINATORS = {"bra", "ret"}
PARAM_LOAD = ("ld", "param")
COMMENT = re.compile(r"//[^\n]*")


@dataclass(frozen=True, slots=True)
class Address:
    """A memory operand in brackets: a register or symbol, plus a byte offset."""

    base: str
    offset: int = 0


Operand = str | int | Address | tuple["Operand", ...]
"""A register, special register or symbol; the bits of a constant; an address; a register vector."""


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction. guard: predicate under which a thread executes it, or with `guard_negated` skips it.

    operation: its arithmetic, per thread; None if it is not pure arithmetic.
    """

    opcode: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: str | None
    guard_negated: bool
    operation: Operation | None
    text: str


@dataclass(slots=True)
class Kernel:
    """params: parameter names, in order. threads: per program. local_bytes: local memory per thread.

    blocks: basic blocks, in `reconvergence_order`. labels: block index by label. fallthrough: the next
    block of threads that do not branch. issue_counts: instructions of a block, without register
    moves and parameter loads.
    """

    params: list[str] = field(default_factory=list)
    threads: int = 0
    local_bytes: int = 0
    blocks: list[list[Instruction]] = field(default_factory=lambda: [[]])
    labels: dict[str, int] = field(default_factory=dict)
    fallthrough: list[int] = field(default_factory=list)
    issue_counts: list[int] = field(default_factory=list)


def parse_kernel(text: str) -> Kernel:
    """Parse PTX that contains one kernel."""
    kernel = Kernel()
    head, _, rest = COMMENT.sub("", text).partition(".visible .entry")
    params, _, rest = rest.partition(")")
    kernel.params = re.findall(r"(\w+_param_\d+)", params)
    threads = re.search(r"\.reqntid\s+(\d+)", rest)
    if threads is None:
        raise ValueError(f"expected .reqntid in the PTX that begins with {head[:200]!r}")
    kernel.threads = int(threads.group(1))
    local = re.search(r"__local_depot\d+\[(\d+)\]", rest)
    kernel.local_bytes = int(local.group(1)) if local else 0
    body = rest[rest.index("{") + 1 :]
    body = body[: body.index("\n}")]
    for line in _statements(body):
        if line.endswith(":"):
            if kernel.blocks[-1]:
                kernel.blocks.append([])
            kernel.labels[line[:-1]] = len(kernel.blocks) - 1
        elif not line.startswith("."):
            instruction = _parse_instruction(line)
            kernel.blocks[-1].append(instruction)
            if instruction.opcode[0] in TERMINATORS:
                kernel.blocks.append([])
    _order_blocks(kernel)
    return kernel


def _order_blocks(kernel: Kernel) -> None:
    end = len(kernel.blocks)
    successors = [_successors(block, index + 1, kernel.labels) for index, block in enumerate(kernel.blocks)]
    order = reconvergence_order([[target for target in targets if target < end] for targets in successors])
    new_index_of = {block: index for index, block in enumerate(order)} | {end: len(order)}
    kernel.labels = {
        name: new_index_of[block] for name, block in kernel.labels.items() if block in new_index_of
    }
    kernel.fallthrough = [new_index_of.get(block + 1, len(order)) for block in order]
    kernel.blocks = [kernel.blocks[block] for block in order]
    kernel.issue_counts = [
        sum(instruction.opcode[0] != "mov" and instruction.opcode[:2] != PARAM_LOAD for instruction in block)
        for block in kernel.blocks
    ]


def _successors(block: list[Instruction], next_block: int, labels: dict[str, int]) -> list[int]:
    """The blocks that may follow a block."""
    if not block or block[-1].opcode[0] not in TERMINATORS:
        return [next_block]
    last = block[-1]
    targets = [labels[str(last.operands[-1])]] if last.opcode[0] == "bra" else []
    return targets if last.guard is None else [*targets, next_block]


def _statements(body: str) -> list[str]:
    """Labels and instructions, without the braces of scopes."""
    statements = list[str]()
    for source_line in body.split("\n"):
        line = source_line.lstrip("{ \t").strip()
        if re.fullmatch(r"\$?\w+:", line):
            statements.append(line)
            continue
        for piece in line.split(";"):
            if piece.strip(" \t}"):
                statements.append(piece.strip())
    return statements


def _parse_instruction(line: str) -> Instruction:
    guard, negated, text = None, False, line
    if line.startswith("@"):
        predicate, line = line.split(None, 1)
        negated = predicate.startswith("@!")
        guard = predicate.lstrip("@!")
    name, rest = (*line.split(None, 1), "")[:2]
    opcode = tuple(name.split("."))
    operands = tuple(_parse_operand(part) for part in _split_operands(rest))
    is_pack = opcode[0] == "mov" and any(isinstance(operand, tuple) for operand in operands)
    return Instruction(opcode, operands, guard, negated, None if is_pack else make_operation(opcode), text)


def _split_operands(text: str) -> list[str]:
    """Split at commas outside braces and brackets."""
    operands, depth, start = list[str](), 0, 0
    for index, letter in enumerate(text):
        depth += (letter in "{[") - (letter in "}]")
        if letter == "," and not depth:
            operands.append(text[start:index].strip())
            start = index + 1
    last = text[start:].strip()
    return [*operands, last] if last else operands


def _parse_operand(text: str) -> Operand:
    if text.startswith("{"):
        return tuple(_parse_operand(part) for part in _split_operands(text.strip("{} ")))
    if text.startswith("["):
        base, _, offset = text.strip("[] ").partition("+")
        return Address(base.strip(), int(offset or 0))
    if text.startswith(("0f", "0d")):
        return int(text[2:], 16)
    if re.fullmatch(r"-?\d+|0x[0-9A-Fa-f]+U?", text):
        return int(text.rstrip("U"), 0)
    return text
