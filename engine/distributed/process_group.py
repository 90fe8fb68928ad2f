"""Tensor-parallel process group: every rank executes the steps that rank 0 broadcasts.

Rank 0 is the caller's process. It schedules, and sends each `StepInput` as JSON: nothing is pickled. It
starts the other ranks (see `worker_pool`), unless torchrun did: then RANK and WORLD_SIZE are set, every
process runs the same program, and the engine's constructor does not return in the other ranks, which end with
rank 0.
"""

from __future__ import annotations

import os
import time
import weakref
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch._C import _distributed_c10d as c10d
from torch.distributed.rendezvous import rendezvous

from ...kernels.common.errors import RunError
from ...kernels.distributed.communicator import Communicator, WorkerDiedError
from ..execution.step_input import StepInput
from ..utils.defer_interrupt import defer_interrupt
from .worker_pool import STORE_ENV, WorkerPool

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch._C._distributed_c10d import Store

    from ..execution.model_runner import ModelRunner
    from .distributed_info import DistributedInfo

START_TIMEOUT, COLLECTIVE_TIMEOUT, STEP_TIMEOUT = (
    timedelta(minutes=5),
    timedelta(minutes=1),
    timedelta(days=365),
)
"""Timeouts for the start of all processes, for a collective, and for the next step. A dead process is noticed
at once, by its closed connections."""
HEADER_BYTES, LENGTH_BYTES = 8192, 8
"""Size of a step's first message, which most steps fit, and of the payload length at its beginning."""


class TensorParallelGroup:
    """This rank's connections to the other ranks of the engine.

    workers: the processes that this one started. Raises RunError when the others do not start.
    """

    def __init__(self, dist_info: DistributedInfo, device: torch.device, workers: WorkerPool | None) -> None:
        self.dist_info, self._device, self._workers = dist_info, device, workers
        if device.type == "cpu":
            torch.set_num_threads(
                min(torch.get_num_threads(), max(1, _count_cores() // dist_info.local_world_size))
            )
        self._death_cause: str | None = None
        self._finalizer: weakref.finalize[..., TensorParallelGroup] | None = None
        if workers:
            self._finalizer = weakref.finalize(self, workers.close)
        with self.fail_together():
            store, make_group = (
                self._rendezvous(),
                _make_gloo_group if device.type == "cpu" else _make_nccl_group,
            )
            try:
                self._step_channel = Communicator(
                    _make_gloo_group(c10d.PrefixStore("orders", store), dist_info, STEP_TIMEOUT)
                )
                group = make_group(c10d.PrefixStore("parts", store), dist_info, COLLECTIVE_TIMEOUT)
            except RuntimeError as error:
                raise WorkerDiedError("another process did not connect") from error
            self.communicator = Communicator(group)
        if workers and device.type != "cpu":
            workers.on_death(lambda cause: group.abort())  # NCCL does not detect a dead peer
        if not workers and not dist_info.rank:
            self._finalizer = weakref.finalize(self, _stop_workers, self._step_channel)

    @property
    def dead_reason(self) -> str | None:
        """Why no more steps can run; None while they can."""
        cause = self._death_cause or (self._workers.death_cause if self._workers else None)
        closed = self._finalizer is not None and not self._finalizer.alive
        return cause or ("it was closed" if closed else None)

    def on_death(self, callback: Callable[[str], None]) -> None:
        """Register callback(cause), called from another thread when a process started by this one dies."""
        if self._workers:
            self._workers.on_death(callback)

    @contextmanager
    def fail_together(self) -> Iterator[None]:
        """Close the engine if the body raises: the other ranks would wait for this one forever.

        Raises RunError with the cause if another process died.
        """
        try:
            yield
        except BaseException as error:
            worker_died = isinstance(error, WorkerDiedError)
            cause = self._workers.wait_for_cause() if self._workers and worker_died else None
            self._death_cause = cause or (str(error) if worker_died else None)
            self.close()
            if self._death_cause and not self.dist_info.rank:
                raise RunError(f"the engine has ended: {self._death_cause}") from error
            raise

    @contextmanager
    def broadcast_step(self, step_input: StepInput) -> Iterator[None]:
        """Broadcast a step; the body executes it on this rank. Raises RunError as `fail_together` does."""
        if dead_reason := self.dead_reason:
            raise RunError(f"the engine has ended: {dead_reason}")
        with defer_interrupt(), self.fail_together():
            _broadcast_bytes(self._step_channel, step_input.to_json())
            yield

    def worker_loop(self, runner: ModelRunner) -> None:
        """Execute steps until rank 0 sends an empty message or dies."""
        while True:
            try:
                payload = _receive_bytes(self._step_channel)
            except WorkerDiedError:
                return
            if not payload:
                return
            runner.execute_as_worker(StepInput.from_json(payload))

    def all_reduce_min(self, value: int) -> int:
        """The minimum of `value` over all ranks."""
        return int(self.communicator.all_gather(torch.tensor([value], device=self._device)).min())

    def close(self) -> None:
        """End the other processes. Idempotent."""
        if self._finalizer:
            self._finalizer()

    def _rendezvous(self) -> Store:
        """Open the c10d store and wait until all ranks have registered."""
        world_size = self.dist_info.world_size
        if path := self._workers.store if self._workers else os.environ.get(STORE_ENV):
            store: Store = c10d.FileStore(path, world_size)
        else:
            store, _, _ = next(rendezvous("env://", timeout=START_TIMEOUT))
        store.set(f"here/{self.dist_info.rank}", "")
        deadline = time.monotonic() + START_TIMEOUT.total_seconds()
        while not store.check([f"here/{rank}" for rank in range(world_size)]):
            if self.dead_reason or time.monotonic() > deadline:
                raise WorkerDiedError(f"the {world_size} processes of the engine did not all start")
            time.sleep(0.02)
        return store


def _make_gloo_group(store: Store, dist_info: DistributedInfo, timeout: timedelta) -> Any:
    """A Gloo group for CPU tensors. If all ranks are on one machine, it listens on 127.0.0.1 only."""
    gloo: Any = c10d.ProcessGroupGloo
    options = gloo._Options()
    if dist_info.local_world_size == dist_info.world_size:
        device = gloo.create_device(hostname="127.0.0.1")
    elif interface := os.environ.get("GLOO_SOCKET_IFNAME"):
        device = gloo.create_device(interface=interface)
    else:
        device = gloo.create_default_device()
    options._devices, options._timeout = [device], timeout
    return gloo(store, dist_info.rank, dist_info.world_size, options)


def _make_nccl_group(store: Store, dist_info: DistributedInfo, timeout: timedelta) -> Any:
    """An NCCL group for GPU tensors."""
    nccl: Any = c10d.ProcessGroupNCCL
    options = nccl.Options()
    options._timeout = timeout
    return nccl(store, dist_info.rank, dist_info.world_size, options)


def _broadcast_bytes(communicator: Communicator, payload: bytes) -> None:
    header = np.zeros(HEADER_BYTES, np.uint8)
    header[:LENGTH_BYTES] = np.array([len(payload)], np.int64).view(np.uint8)
    head, tail = payload[: HEADER_BYTES - LENGTH_BYTES], payload[HEADER_BYTES - LENGTH_BYTES :]
    header[LENGTH_BYTES : LENGTH_BYTES + len(head)] = np.frombuffer(head, np.uint8)
    communicator.broadcast(torch.from_numpy(header))
    if tail:
        communicator.broadcast(torch.frombuffer(bytearray(tail), dtype=torch.uint8))


def _receive_bytes(communicator: Communicator) -> bytes:
    header = communicator.broadcast(torch.zeros(HEADER_BYTES, dtype=torch.uint8)).numpy()
    length = int(header[:LENGTH_BYTES].view(np.int64)[0])
    payload = header[LENGTH_BYTES : LENGTH_BYTES + length].tobytes()
    if num_missing := length - len(payload):
        payload += communicator.broadcast(torch.zeros(num_missing, dtype=torch.uint8)).numpy().tobytes()
    return payload


def _stop_workers(step_channel: Communicator) -> None:
    """Send the empty message that ends the workers started by torchrun."""
    with suppress(WorkerDiedError):
        _broadcast_bytes(step_channel, b"")


def _count_cores() -> int:
    """Number of CPU cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1
