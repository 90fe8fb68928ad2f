"""What is known of a kernel: its reference, and the shapes of real models that it is compiled and timed at.

It imports no triton: what a case compiles is what its launch launches, see `kernels.specs.aot_compile`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .roofline import Work

HELD = 1 << 22
"""Numbers of a weight that a CPU fills."""


@dataclass(frozen=True)
class Case:
    """One shape of a real model.

    make: fresh arguments, the same for the reference and the launcher, from a device and a generator of the
    CPU's. work: what it moves and computes at least.
    """

    name: str
    make: Callable[[torch.device, torch.Generator], tuple[Any, ...]]
    work: Work

    @property
    def bytes(self) -> int:
        """The least that must cross the memory bus."""
        return int(self.work.bytes)


def weight_of(out: int, inner: int, where: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """A random weight [out, inner] of a case; a large one on a CPU, where launches are only recorded and half
    a billion numbers take seconds, has any."""
    weight = torch.empty(out, inner, device=where, dtype=dtype)
    return weight if where.type == "cpu" and weight.numel() > HELD else weight.normal_(std=inner**-0.5)


@dataclass(frozen=True)
class KernelSpec:
    """One operation: launch and reference take the same arguments and give the same results."""

    name: str
    reference: Callable[..., Any]
    launch: Callable[..., Any]
    cases: tuple[Case, ...]
