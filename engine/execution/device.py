"""The device and the backend of an engine, chosen or refused in one sentence."""

from __future__ import annotations

import os
from dataclasses import replace
from importlib.util import find_spec

import torch

from ...kernels.backend import CPU_BACKEND, REFERENCE_BACKEND, Backend, min_warmup_shapes
from ...kernels.common.errors import InputError
from ...kernels.lm_head import sample_from_hidden

IMPORT_PID = os.getpid()
"""The process that imported torch; one that was forked from it since has another number."""


def resolve_device(name: str, offset: int = 0, num_devices: int = 1) -> torch.device:
    """The device of that name; "auto" is the first GPU, a CPU without one. A GPU always has its number.

    Of an engine that uses several from there on, the one at `offset`.

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
    available = "cuda:0" if count == 1 else f"cuda:0 to cuda:{count - 1}"
    if index >= count:
        raise InputError(f"device is {name!r}; this machine has {available}", "device")
    if index + max(num_devices, offset + 1) > count:
        raise InputError(
            f"device is {name!r} and tensor_parallel_size {num_devices}, one GPU each; this machine has "
            f"{available}",
            "tensor_parallel_size",
        )
    return torch.device("cuda", index + offset)


def limit_threads_after_fork() -> None:
    """Leaves torch one thread in a forked process, where OpenMP would wait for those it had before."""
    if os.getpid() != IMPORT_PID:
        torch.set_num_threads(1)


def select_backend(
    kernels: str, device: torch.device, batch_invariant: bool = False, world_size: int = 1
) -> Backend:
    """What computes there. Raises InputError for Triton's kernels where nothing can run them.

    batch_invariant: whether a row's bits must be its own, which with torch's kernels on a CPU they are in any
    case. Raises InputError elsewhere for these, and for several processes, which add up in their own order.
    """
    on_cpu = device.type == "cpu"
    if batch_invariant and (kernels == "triton" or not on_cpu):
        _check_invariance(kernels, world_size)
    if kernels == "torch" or (kernels == "auto" and on_cpu):
        return CPU_BACKEND if on_cpu else REFERENCE_BACKEND
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
    from ...kernels.triton.backend import INVARIANT, TRITON  # noqa: PLC0415 - it brings triton

    if world_size > 1:
        return make_distributed(TRITON)
    return INVARIANT if batch_invariant else TRITON


def make_distributed(backend: Backend) -> Backend:
    """The same for one of several processes that hold a model: torch chooses, as these kernels read whole
    rows, nothing is captured, and each warms up by the same steps, whatever it is tuned to."""
    return replace(backend, sample=sample_from_hidden, cuda_graphs=False, warmup_shapes=min_warmup_shapes)


def _check_invariance(kernels: str, world_size: int) -> None:
    conflict = ""
    if kernels == "torch":
        conflict = "kernels is 'torch', whose products on a GPU round by the number of rows"
    elif world_size > 1:
        conflict = f"tensor_parallel_size is {world_size}; GPUs add up what each has in an order of their own"
    if conflict:
        raise InputError(f"batch_invariant is on, and {conflict}: leave one of them out", "batch_invariant")
