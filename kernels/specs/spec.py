"""Kernel spec: the launcher, its reference, and the model shapes that it is compiled and timed at.

Does not import triton; `kernels.specs.aot_compile` records what a launch compiles.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .roofline import OpCost

MAX_INIT_NUMEL = 1 << 22
"""Maximum size of a weight that is initialised on a CPU, in elements."""


@dataclass(frozen=True)
class KernelCase:
    """Arguments of one launch at the shape of a real model.

    make_args: (device, CPU generator) → fresh arguments of the reference or the launcher. cost: minimum
    bytes moved and FLOPs.
    """

    name: str
    make_args: Callable[[torch.device, torch.Generator], tuple[Any, ...]]
    cost: OpCost

    @property
    def bytes(self) -> int:
        """Minimum memory traffic in bytes."""
        return int(self.cost.bytes)


def random_weight(
    out_features: int, in_features: int, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """A random weight [out, in]. A large weight on a CPU is left uninitialised: launches there are only
    recorded, and half a billion random numbers take seconds."""
    weight = torch.empty(out_features, in_features, device=device, dtype=dtype)
    return (
        weight
        if device.type == "cpu" and weight.numel() > MAX_INIT_NUMEL
        else weight.normal_(std=in_features**-0.5)
    )


@dataclass(frozen=True)
class KernelSpec:
    """One operation: `launch` and `reference` take the same arguments and return the same results."""

    name: str
    reference: Callable[..., Any]
    launch: Callable[..., Any]
    cases: tuple[KernelCase, ...]
