"""Where an engine decodes, and with which kernels: asked for, found or refused in one sentence."""

from __future__ import annotations

import os
from dataclasses import replace
from importlib.util import find_spec

import torch

from ...kernels.backend import PLAIN, TORCH, Backend, one_pair
from ...kernels.common.errors import InputError
from ...kernels.lm_head import choose

STARTED = os.getpid()
"""The process that imported torch; one that was forked from it since has another number."""


def device_of(name: str, offset: int = 0, used: int = 1) -> torch.device:
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
    there = "cuda:0" if count == 1 else f"cuda:0 to cuda:{count - 1}"
    if index >= count:
        raise InputError(f"device is {name!r}; this machine has {there}", "device")
    if index + max(used, offset + 1) > count:
        raise InputError(
            f"device is {name!r} and tensor_parallel_size {used}, one GPU each; this machine has {there}",
            "tensor_parallel_size",
        )
    return torch.device("cuda", index + offset)


def without_lost_threads() -> None:
    """Leaves torch one thread in a forked process, where OpenMP would wait for those it had before."""
    if os.getpid() != STARTED:
        torch.set_num_threads(1)


def backend_of(
    kernels: str, device: torch.device, batch_invariant: bool = False, processes: int = 1
) -> Backend:
    """What computes there. Raises InputError for Triton's kernels where nothing can run them.

    batch_invariant: whether a row's bits must be its own, which with torch's kernels on a CPU they are in any
    case. Raises InputError elsewhere for these, and for several processes, which add up in their own order.
    """
    on_cpu = device.type == "cpu"
    if batch_invariant and (kernels == "triton" or not on_cpu):
        _require_invariance(kernels, processes)
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
    from ...kernels.triton.backend import INVARIANT, TRITON  # noqa: PLC0415 - it brings triton

    if processes > 1:
        return shared(TRITON)
    return INVARIANT if batch_invariant else TRITON


def shared(backend: Backend) -> Backend:
    """The same for one of several processes that hold a model: torch chooses, as these kernels read whole
    rows, nothing is captured, and each warms up by the same steps, whatever it is tuned to."""
    return replace(backend, choose=choose, graphs=False, warm_shapes=one_pair)


def _require_invariance(kernels: str, processes: int) -> None:
    wrong = ""
    if kernels == "torch":
        wrong = "kernels is 'torch', whose products on a GPU round by the number of rows"
    elif processes > 1:
        wrong = f"tensor_parallel_size is {processes}; GPUs add up what each has in an order of their own"
    if wrong:
        raise InputError(f"batch_invariant is on, and {wrong}: leave one of them out", "batch_invariant")
