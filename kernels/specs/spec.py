"""What is known of a kernel: its reference, and the shapes of real models that it is compiled and timed at.

It imports no triton: what a case compiles is what its launch launches, see `kernels.specs.aot_compile`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .roofline import OpCost

MAX_INIT_NUMEL = 1 << 22
"""Numbers of a weight that a CPU fills."""


@dataclass(frozen=True)
class KernelCase:
    """One shape of a real model.

    make_args: fresh arguments, the same for the reference and the launcher, from a device and a generator
    of the CPU's. cost: what it moves and computes at least.
    """

    name: str
    make_args: Callable[[torch.device, torch.Generator], tuple[Any, ...]]
    cost: OpCost

    @property
    def bytes(self) -> int:
        """The least that must cross the memory bus."""
        return int(self.cost.bytes)


def random_weight(
    out_features: int, in_features: int, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """A random weight [out, inner] of a case; a large one on a CPU, where launches are only recorded and half
    a billion numbers take seconds, has any."""
    weight = torch.empty(out_features, in_features, device=device, dtype=dtype)
    return (
        weight
        if device.type == "cpu" and weight.numel() > MAX_INIT_NUMEL
        else weight.normal_(std=in_features**-0.5)
    )


@dataclass(frozen=True)
class KernelSpec:
    """One operation: launch and reference take the same arguments and give the same results."""

    name: str
    reference: Callable[..., Any]
    launch: Callable[..., Any]
    cases: tuple[KernelCase, ...]
