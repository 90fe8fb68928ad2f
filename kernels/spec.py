"""What is known of a kernel: its reference, the shapes that it is tried at, and how models have it compiled.

One description serves the tests, the benchmark and the static table of `trimtab profile kernels`. It imports
no triton: a jitted function is held as any object.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Case:
    """One shape that a kernel is tried at.

    make: fresh arguments, the same for the reference and the launcher, from a device and a generator of the
    CPU's. bytes, flops: the least that must cross the memory bus, and the operations on floating point.
    """

    name: str
    make: Callable[[torch.device, torch.Generator], tuple[Any, ...]]
    bytes: int
    flops: int


@dataclass(frozen=True)
class Build:
    """A jitted function as one model has it compiled.

    types: the run-time parameters, as triton spells types ("*fp32", "*bf16", "i32", …). constants: the values
    of constexpr parameters. unaligned: parameters that 16 need not divide; of the others, every pointer and
    integer is taken to be a multiple of 16.
    """

    name: str
    function: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    warps: int = 4
    stages: int = 2
    unaligned: frozenset[str] = frozenset()


@dataclass(frozen=True)
class KernelSpec:
    """One operation: launch and reference take the same arguments and give the same results.

    checked: small odd shapes, for the interpreter. real: shapes of real models, for benchmark and floors.
    builds: what is compiled ahead of time, without a GPU, and must not spill.
    """

    name: str
    reference: Callable[..., Any]
    launch: Callable[..., Any]
    checked: tuple[Case, ...]
    real: tuple[Case, ...]
    builds: tuple[Build, ...]
