"""Several processes as one engine: each holds a part of the model, and all do what the first one orders.

Rank 0 is the caller's process. It plans, and sends each step's order as JSON: nothing is pickled. The others
are started by it (see `workers`), or by torchrun, where RANK and WORLD_SIZE are set and every process runs
the same program; there the engine's constructor does not return in the others, which end with the first.
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
from ...kernels.distributed.communicator import LostPeerError, Peers
from ..execution.step_input import Order
from ..utils.defer_interrupt import undisturbed
from .worker_pool import STORE, Workers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch._C._distributed_c10d import Store

    from ..execution.model_runner import Runner
    from .distributed_info import Place

STARTING, EXCHANGE, ORDER = timedelta(minutes=5), timedelta(minutes=1), timedelta(days=365)
"""How long a process waits for the others to start, for their parts of a result, and for the next order. One
that dies is noticed at once, by its closed connections."""
HEAD, LENGTH = 8192, 8
"""Bytes of an order's first message, which most orders fit, and of its length at the beginning of it."""


class Ranks:
    """The processes of one engine, as one of them sees the others.

    workers: those that this process started. Raises RunError when the others do not start.
    """

    def __init__(self, place: Place, device: torch.device, workers: Workers | None) -> None:
        self.place, self._device, self._workers = place, device, workers
        if device.type == "cpu":
            torch.set_num_threads(min(torch.get_num_threads(), max(1, _cores() // place.beside)))
        self._cause: str | None = None
        self._leave: weakref.finalize[..., Ranks] | None = None
        if workers:
            self._leave = weakref.finalize(self, workers.close)
        with self.together():
            store, kind = self._meet(), _gloo if device.type == "cpu" else _nccl
            try:
                self._orders = Peers(_gloo(c10d.PrefixStore("orders", store), place, ORDER))
                group = kind(c10d.PrefixStore("parts", store), place, EXCHANGE)
            except RuntimeError as error:
                raise LostPeerError("another process does not connect") from error
            self.peers = Peers(group)
        if workers and device.type != "cpu":
            workers.when_one_dies(lambda cause: group.abort())  # NCCL does not notice by itself
        if not workers and not place.rank:
            self._leave = weakref.finalize(self, _dismiss, self._orders)

    @property
    def broken(self) -> str | None:
        """Why no more orders can be carried out; None while they can."""
        cause = self._cause or (self._workers.ended if self._workers else None)
        closed = self._leave is not None and not self._leave.alive
        return cause or ("it was closed" if closed else None)

    def when_broken(self, tell: Callable[[str], None]) -> None:
        """Calls tell(cause), from another thread, when a process dies that was started here."""
        if self._workers:
            self._workers.when_one_dies(tell)

    @contextmanager
    def together(self) -> Iterator[None]:
        """What fails within ends the engine: the others wait for what will not come.

        Raises RunError with the cause where it is that another process is gone.
        """
        try:
            yield
        except BaseException as error:
            lost = isinstance(error, LostPeerError)
            cause = self._workers.cause() if self._workers and lost else None
            self._cause = cause or (str(error) if lost else None)
            self.close()
            if self._cause and not self.place.rank:
                raise RunError(f"the engine has ended: {self._cause}") from error
            raise

    @contextmanager
    def lead(self, order: Order) -> Iterator[None]:
        """Sends an order, which is to be carried out here within. Raises RunError as `together` does."""
        if broken := self.broken:
            raise RunError(f"the engine has ended: {broken}")
        with undisturbed(), self.together():
            _send(self._orders, order.to_json())
            yield

    def follow(self, runner: Runner) -> None:
        """Carries out orders until there are no more, or the first process is gone."""
        while True:
            try:
                text = _receive(self._orders)
            except LostPeerError:
                return
            if not text:
                return
            runner.follow(Order.from_json(text))

    def least(self, number: int) -> int:
        """The least of everyone's numbers."""
        return int(self.peers.gather(torch.tensor([number], device=self._device)).min())

    def close(self) -> None:
        """Ends the other processes. May be called again."""
        if self._leave:
            self._leave()

    def _meet(self) -> Store:
        """The store by which all find each other, when all have come to it."""
        size = self.place.size
        if path := self._workers.store if self._workers else os.environ.get(STORE):
            store: Store = c10d.FileStore(path, size)
        else:
            store, _, _ = next(rendezvous("env://", timeout=STARTING))
        store.set(f"here/{self.place.rank}", "")
        until = time.monotonic() + STARTING.total_seconds()
        while not store.check([f"here/{rank}" for rank in range(size)]):
            if self.broken or time.monotonic() > until:
                raise LostPeerError(f"the {size} processes of the engine did not all start")
            time.sleep(0.02)
        return store


def _gloo(store: Store, place: Place, timeout: timedelta) -> Any:
    """A group for tensors on a CPU. Where all processes are on one machine they listen to it alone."""
    gloo: Any = c10d.ProcessGroupGloo
    options = gloo._Options()
    if place.beside == place.size:
        device = gloo.create_device(hostname="127.0.0.1")
    elif interface := os.environ.get("GLOO_SOCKET_IFNAME"):
        device = gloo.create_device(interface=interface)
    else:
        device = gloo.create_default_device()
    options._devices, options._timeout = [device], timeout
    return gloo(store, place.rank, place.size, options)


def _nccl(store: Store, place: Place, timeout: timedelta) -> Any:
    """A group for tensors on GPUs."""
    nccl: Any = c10d.ProcessGroupNCCL
    options = nccl.Options()
    options._timeout = timeout
    return nccl(store, place.rank, place.size, options)


def _send(peers: Peers, text: bytes) -> None:
    head = np.zeros(HEAD, np.uint8)
    head[:LENGTH] = np.array([len(text)], np.int64).view(np.uint8)
    first, rest = text[: HEAD - LENGTH], text[HEAD - LENGTH :]
    head[LENGTH : LENGTH + len(first)] = np.frombuffer(first, np.uint8)
    peers.tell(torch.from_numpy(head))
    if rest:
        peers.tell(torch.frombuffer(bytearray(rest), dtype=torch.uint8))


def _receive(peers: Peers) -> bytes:
    head = peers.tell(torch.zeros(HEAD, dtype=torch.uint8)).numpy()
    length = int(head[:LENGTH].view(np.int64)[0])
    text = head[LENGTH : LENGTH + length].tobytes()
    if missing := length - len(text):
        text += peers.tell(torch.zeros(missing, dtype=torch.uint8)).numpy().tobytes()
    return text


def _dismiss(orders: Peers) -> None:
    """Tells processes that torchrun started that there is no more to do."""
    with suppress(LostPeerError):
        _send(orders, b"")


def _cores() -> int:
    """How many this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1
