"""What is known of a kernel: its reference, and the shapes of real models that it is compiled and timed at.

It imports no triton: what a case compiles is what its launch launches, see `kernels.gpu.ahead`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Case:
    """One shape of a real model.

    make: fresh arguments, the same for the reference and the launcher, from a device and a generator of the
    CPU's. bytes: the least that must cross the memory bus.
    """

    name: str
    make: Callable[[torch.device, torch.Generator], tuple[Any, ...]]
    bytes: int


@dataclass(frozen=True)
class KernelSpec:
    """One operation: launch and reference take the same arguments and give the same results."""

    name: str
    reference: Callable[..., Any]
    launch: Callable[..., Any]
    cases: tuple[Case, ...]
