"""Where an engine decodes, and with which kernels: asked for, found or refused in one sentence."""

from __future__ import annotations

import os
from importlib.util import find_spec

import torch

from ..kernels.backend import PLAIN, TORCH, Backend
from ..kernels.errors import InputError


def device_of(name: str) -> torch.device:
    """The device of that name; "auto" is the first GPU, a CPU without one. A GPU always has its number.

    Raises InputError when there is no such device.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and not count):
        return torch.device("cpu")
    if not count:
        raise InputError(
            f"device is {name!r}, and torch finds no such GPU on this machine; take 'cpu', or a torch that "
            "is made for it",
            "device",
        )
    index = int(name.partition(":")[2] or 0)
    if index >= count:
        there = "cuda:0" if count == 1 else f"cuda:0 to cuda:{count - 1}"
        raise InputError(f"device is {name!r}; this machine has {there}", "device")
    return torch.device("cuda", index)


def backend_of(kernels: str, device: torch.device) -> Backend:
    """What computes there. Raises InputError for Triton's kernels where nothing can run them."""
    on_cpu = device.type == "cpu"
    if kernels == "torch" or (kernels == "auto" and on_cpu):
        return TORCH if on_cpu else PLAIN
    if on_cpu and os.environ.get("TRITON_INTERPRET") != "1":
        raise InputError(
            "kernels is 'triton' and device a CPU, where they are interpreted, for tests: set "
            "TRITON_INTERPRET=1 before the process starts, or take 'torch'",
            "kernels",
        )
    if find_spec("triton") is None:
        raise InputError(
            f"kernels is {kernels!r}, and the package triton is not installed: install it, or take 'torch', "
            "which is slow on a GPU",
            "kernels",
        )
    from ..kernels.gpu.backend import TRITON  # noqa: PLC0415 - it brings triton

    return TRITON
