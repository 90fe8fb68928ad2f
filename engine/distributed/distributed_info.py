"""Which of an engine's processes this one is."""

from __future__ import annotations

import os
from dataclasses import dataclass

from ...kernels.common.errors import InputError


@dataclass(frozen=True)
class Place:
    """Where a process stands: `rank` of `size`, and its number among those `beside` it on its machine.

    alone: it was started by itself, and is to start the others.
    """

    rank: int
    size: int
    local: int
    beside: int
    alone: bool

    @classmethod
    def of(cls, size: int) -> Place:
        """That of this process. Raises InputError where torchrun started another number of processes."""
        if size == 1 or "RANK" not in os.environ:
            return cls(0, size, 0, size, alone=True)
        started = os.environ.get("WORLD_SIZE", "none")
        if started != str(size):
            raise InputError(
                f"tensor_parallel_size is {size}, and WORLD_SIZE, which torchrun sets, is {started}; they "
                "must be the same",
                "tensor_parallel_size",
            )
        rank = os.environ["RANK"]
        local, beside = os.environ.get("LOCAL_RANK", rank), os.environ.get("LOCAL_WORLD_SIZE", started)
        return cls(int(rank), size, int(local), int(beside), alone=False)
