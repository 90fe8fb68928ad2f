"""Collectives between the processes that hold parts of one model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..common.errors import RunError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Work


class WorkerDiedError(RunError):
    """Another process is gone, or has kept this one waiting for too long."""


class Communicator:
    """This process is number `rank` of `world_size`; all of them make the same calls in the same order.

    group: gloo's for tensors on a CPU, NCCL's for those on a GPU. Every call may raise LostPeerError.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self.rank, self.world_size, self._group = group.rank(), group.size(), group

    def all_gather(self, x: Tensor) -> Tensor:
        """Everyone's x, in the order of ranks: [size, *x's shape]. All must have the same shape."""
        gathered = x.new_empty(self.world_size, *x.shape)
        _wait(self._group._allgather_base(gathered.view(-1), x.reshape(-1)))
        return gathered

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of everyone's x. May reuse the memory of x.

        On a CPU always in the order of ranks, where gloo's own sum takes another for each piece of a tensor:
        so the bits of a row do not depend on which rows stand beside it; in float32 at least.
        """
        if x.is_cuda:
            _wait(self._group.allreduce([x]))
            return x
        total, *others = self.all_gather(x).unbind()
        if x.is_floating_point():
            total = total.to(torch.promote_types(x.dtype, torch.float32))
        for other in others:
            total += other
        return total

    def broadcast(self, x: Tensor) -> Tensor:
        """Gives everyone what x holds in the first process, in its place."""
        _wait(self._group.broadcast(x, 0))
        return x


def _wait(work: Work) -> None:
    try:
        work.wait()
    except RuntimeError as error:
        raise WorkerDiedError("another process does not answer") from error
