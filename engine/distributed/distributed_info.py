"""Rank and world size of this process."""

from __future__ import annotations

import os
from dataclasses import dataclass

from ...kernels.common.errors import InputError


@dataclass(frozen=True)
class DistributedInfo:
    """`rank` of `world_size` processes, and `local_rank` of the `local_world_size` on this machine.

    spawns_workers: this process was not started by torchrun and starts the others.
    """

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    spawns_workers: bool

    @classmethod
    def from_env(cls, world_size: int) -> DistributedInfo:
        """Read the environment. Raises InputError if torchrun started another number of processes."""
        if world_size == 1 or "RANK" not in os.environ:
            return cls(0, world_size, 0, world_size, spawns_workers=True)
        env_world_size = os.environ.get("WORLD_SIZE", "none")
        if env_world_size != str(world_size):
            raise InputError(
                f"tensor_parallel_size is {world_size}, and WORLD_SIZE, which torchrun sets, is "
                f"{env_world_size}; they must be equal",
                "tensor_parallel_size",
            )
        rank = os.environ["RANK"]
        local_rank, local_world_size = (
            os.environ.get("LOCAL_RANK", rank),
            os.environ.get("LOCAL_WORLD_SIZE", env_world_size),
        )
        return cls(int(rank), world_size, int(local_rank), int(local_world_size), spawns_workers=False)
