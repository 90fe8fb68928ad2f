"""Device and kernel backend selection."""

from __future__ import annotations

import os
from dataclasses import replace
from importlib.util import find_spec

import torch

from ...kernels.backend import CPU_BACKEND, REFERENCE_BACKEND, Backend, min_warmup_shapes
from ...kernels.common.errors import InputError
from ...kernels.lm_head import sample_from_hidden

IMPORT_PID = os.getpid()
"""Id of the process that imported this module; a fork of it has another."""


def resolve_device(name: str, offset: int = 0, num_devices: int = 1) -> torch.device:
    """Resolve a device name; "auto" is the first GPU, or the CPU without one. A GPU always has its index.

    An engine on `num_devices` GPUs uses consecutive ones; `offset` selects one of them.

    Raises InputError when the device does not exist.
    """
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and not count):
        return torch.device("cpu")
    if not count:
        raise InputError(
            f"device is {name!r}, and torch finds no GPU on this machine; use 'cpu', or a torch build for "
            "this GPU",
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
    """Limit torch to one thread in a forked process: OpenMP would wait for the parent's threads."""
    if os.getpid() != IMPORT_PID:
        torch.set_num_threads(1)


def select_backend(
    kernels: str, device: torch.device, batch_invariant: bool = False, world_size: int = 1
) -> Backend:
    """Select the kernel backend. Raises InputError for Triton kernels that cannot run on the device.

    batch_invariant: a row's result must be bit-identical in any batch. The torch kernels on a CPU always are.
    Raises InputError for torch kernels on a GPU, and for several processes: their summation order is
    unspecified.
    """
    on_cpu = device.type == "cpu"
    if batch_invariant and (kernels == "triton" or not on_cpu):
        _check_invariance(kernels, world_size)
    if kernels == "torch" or (kernels == "auto" and on_cpu):
        return CPU_BACKEND if on_cpu else REFERENCE_BACKEND
    if on_cpu and os.environ.get("TRITON_INTERPRET") != "1":
        raise InputError(
            "kernels is 'triton' and the device is a CPU, where Triton only runs interpreted, for tests: set "
            "TRITON_INTERPRET=1 before the process starts, or use 'torch'",
            "kernels",
        )
    if find_spec("triton") is None:
        raise InputError(
            f"kernels is {kernels!r}, and the package triton is not installed: install it, or use 'torch', "
            "which is slow on a GPU",
            "kernels",
        )
    from ...kernels.triton.backend import INVARIANT, TRITON  # noqa: PLC0415 - imports triton

    if world_size > 1:
        return make_distributed(TRITON)
    return INVARIANT if batch_invariant else TRITON


def make_distributed(backend: Backend) -> Backend:
    """The backend for tensor parallelism: torch samples, as the Triton kernels need full vocabulary rows; no
    CUDA graphs; and every rank warms up with the same steps, whatever the tuning."""
    return replace(backend, sample=sample_from_hidden, cuda_graphs=False, warmup_shapes=min_warmup_shapes)


def _check_invariance(kernels: str, world_size: int) -> None:
    conflict = ""
    if kernels == "torch":
        conflict = "kernels is 'torch', whose matmuls on a GPU round differently by the number of rows"
    elif world_size > 1:
        conflict = (
            f"tensor_parallel_size is {world_size}; GPUs sum their partial results in an unspecified order"
        )
    if conflict:
        raise InputError(
            f"batch_invariant is on, and {conflict}: remove one of the two settings", "batch_invariant"
        )
