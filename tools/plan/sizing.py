"""Choose the number of replicas and the tensor-parallel size for a load."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil
from typing import TYPE_CHECKING

from ...kernels.common.errors import InputError
from ...models.tensor_parallel import is_divisible
from ..common.datasheets import GPUS_PER_NODE

if TYPE_CHECKING:
    from ...models.config import ModelConfig
    from ..common.datasheets import Gpu
    from .replica import Replica


@dataclass(frozen=True)
class Estimate:
    """`num_replicas` copies of `replica`."""

    replica: Replica
    num_replicas: int

    @property
    def num_gpus(self) -> int:
        return self.num_replicas * self.replica.tp_size

    @property
    def rate(self) -> float:
        """Requests per second of one replica."""
        return self.replica.demand.rps / self.num_replicas

    @property
    def num_requests(self) -> float:
        """Requests in flight on one replica."""
        return self.replica.concurrency(self.rate)


def estimate(replica: Replica, tp_size: int | None = None) -> Estimate:
    """The estimate with the fewest devices, then the lowest TPOT; `tp_size` fixes the tensor-parallel size.

    Raises InputError if weights and one request do not fit one machine, or no size meets the TPOT limit.
    """
    candidates = [
        replace(replica, tp_size=size) for size in valid_tp_sizes(replica.config, replica.gpu, tp_size)
    ]
    feasible = [
        Estimate(candidate, _num_replicas(candidate)) for candidate in candidates if candidate.max_requests
    ]
    if feasible:
        return min(feasible, key=lambda e: (e.num_gpus, e.replica.tpot(e.num_requests)))
    raise InputError(_infeasible_reason(candidates[-1]))


def valid_tp_sizes(config: ModelConfig, gpu: Gpu, tp_size: int | None = None) -> list[int]:
    """Tensor-parallel sizes that divide the heads, ascending. Raises InputError for another `tp_size`."""
    max_size = GPUS_PER_NODE if gpu.link_bandwidth else 1
    valid = [size for size in range(1, max_size + 1) if is_divisible(size, config)]
    if tp_size is None:
        return valid
    if tp_size not in valid:
        raise InputError(
            f"tensor_parallel_size is {tp_size}; with {config.num_heads} heads and {config.num_kv_heads} KV "
            f"heads on {gpu.name} it must be one of {', '.join(map(str, valid))}"
        )
    return [tp_size]


def _num_replicas(replica: Replica) -> int:
    return ceil(replica.demand.rps / (replica.assumptions.load * replica.request_rate(replica.max_requests)))


def _infeasible_reason(largest: Replica) -> str:
    hardware = (
        f"{largest.tp_size} x {largest.gpu.name}"
        if largest.gpu.link_bandwidth
        else f"this {largest.gpu.name}"
    )
    max_tpot, gib = largest.assumptions.tpot, 1 << 30
    if (
        max_tpot is not None
        and replace(largest, assumptions=replace(largest.assumptions, tpot=None)).max_requests
    ):
        least_ms = 1e3 * largest.tpot(1)
        return f"tpot_ms is {1e3 * max_tpot:g}; on {hardware} one request takes {least_ms:.3g} ms per token"
    needed_bytes = (
        largest.weight_bytes + largest.tp_size * largest.workspace_bytes + largest.kv_bytes_per_request
    )
    usable_bytes = largest.tp_size * largest.gpu.memory * largest.assumptions.memory_utilization
    return (
        f"the model does not fit: weights, the largest step and one request take {needed_bytes / gib:.3g} "
        f"GiB; the largest configuration, {hardware}, has {usable_bytes / gib:.3g} GiB"
    )
