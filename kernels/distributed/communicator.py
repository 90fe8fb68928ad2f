"""Collectives between the processes of a tensor-parallel model."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..common.errors import RunError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup, Work


class WorkerDiedError(RunError):
    """Another process exited, or did not respond within the timeout."""


class Communicator:
    """Collectives of process `rank` of `world_size`; all processes make the same calls in the same order.

    group: a gloo group for CPU tensors, an NCCL group for GPU tensors. Every call may raise WorkerDiedError.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self.rank, self.world_size, self._group = group.rank(), group.size(), group

    def all_gather(self, x: Tensor) -> Tensor:
        """Every rank's x in rank order: [world_size, *x.shape]. All must have the same shape."""
        gathered = x.new_empty(self.world_size, *x.shape)
        _wait(self._group._allgather_base(gathered.view(-1), x.reshape(-1)))
        return gathered

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of every rank's x. May overwrite x.

        On a CPU, sums in rank order and in at least float32, so that the bits of a row do not depend on other
        rows; gloo's all-reduce uses a different order for each part of a tensor.
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
        """Overwrite every rank's x with rank 0's."""
        _wait(self._group.broadcast(x, 0))
        return x


def _wait(work: Work) -> None:
    try:
        work.wait()
    except RuntimeError as error:
        raise WorkerDiedError("another process exited or timed out") from error
