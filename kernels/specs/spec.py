"""Kernel spec: a kernel's only registration, with its reference, launcher, and the shapes of real models.

Does not import triton; `kernels.specs.aot_compile` records what a launch compiles.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import Any

import torch

from .roofline import OpCost

TRITON_PACKAGE = f"{__package__.rpartition('.')[0]}.triton"
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
    """One operation: `launch` and `reference` take the same arguments and return the same results.

    triton: the Triton launcher, or its "module.function" below `kernels.triton`, imported at the first use.
    cases: the launches that are compiled, checked and timed. is_layer_op: whether decoder layers call
    it, as the attribute of `kernels.ops.Ops` with this name.

    How results are compared: atol is the absolute tolerance. has_float64: whether the reference computes in
    float64 if its arguments are float64. normalize: applied to the results first; None for none.
    """

    name: str
    reference: Callable[..., Any]
    triton: str | Callable[..., Any]
    cases: tuple[KernelCase, ...]
    is_layer_op: bool = False
    atol: float = 1e-5
    has_float64: bool = True
    normalize: Callable[[Any], Any] | None = None

    @cached_property
    def launch(self) -> Callable[..., Any]:
        """The Triton launcher. Imports triton."""
        if not isinstance(self.triton, str):
            return self.triton
        module, _, function = self.triton.rpartition(".")
        launcher: Callable[..., Any] = getattr(import_module(f"{TRITON_PACKAGE}.{module}"), function)
        return launcher
