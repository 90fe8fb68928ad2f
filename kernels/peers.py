"""The other processes that hold parts of the same model, and the two ways to exchange tensors with them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Peers:
    """This process is number `rank` of `size`; all of them make the same calls in the same order.

    group: gloo's for tensors on a CPU, NCCL's for those on a GPU. A call raises RuntimeError when another
    process is gone.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self.rank, self.size, self._group = group.rank(), group.size(), group

    def gather(self, x: Tensor) -> Tensor:
        """Everyone's x, in the order of ranks: [size, *x's shape]. All must have the same shape."""
        parts = x.new_empty(self.size, *x.shape)
        self._group._allgather_base(parts.view(-1), x.reshape(-1)).wait()
        return parts

    def sum(self, x: Tensor) -> Tensor:
        """The sum of everyone's x.

        On a CPU always in the order of ranks, where gloo's own sum takes another for each piece of a tensor:
        so the bits of a row do not depend on which rows stand beside it. May reuse the memory of x.
        """
        if x.is_cuda:
            self._group.allreduce([x]).wait()
            return x
        total, *others = self.gather(x).unbind()
        for part in others:
            total += part
        return total
