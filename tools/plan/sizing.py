"""How many devices carry a load, and how a model is cut over them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil
from typing import TYPE_CHECKING

from ...kernels.common.errors import InputError
from ...models.tensor_parallel import divides
from ..common.datasheets import NODE

if TYPE_CHECKING:
    from ...models.config import ModelConfig
    from ..common.datasheets import Gpu
    from .replica import Replica


@dataclass(frozen=True)
class Estimate:
    """So many replicas of one kind."""

    replica: Replica
    replicas: int

    @property
    def gpus(self) -> int:
        return self.replicas * self.replica.shares

    @property
    def rate(self) -> float:
        """Requests a second of one replica."""
        return self.replica.demand.rps / self.replicas

    @property
    def requests(self) -> float:
        """In flight on one replica."""
        return self.replica.in_flight(self.rate)


def estimate(replica: Replica, shares: int | None = None) -> Estimate:
    """The fewest devices that carry the demand, of these the quickest; `shares` is how the model is cut.

    Raises InputError where no machine has room for weights and a request, or time for a token.
    """
    kinds = [replace(replica, shares=count) for count in degrees(replica.config, replica.gpu, shares)]
    able = [Estimate(kind, _replicas(kind)) for kind in kinds if kind.most]
    if able:
        return min(able, key=lambda found: (found.gpus, found.replica.tpot(found.requests)))
    raise InputError(_why_not(kinds[-1]))


def degrees(config: ModelConfig, gpu: Gpu, asked: int | None = None) -> list[int]:
    """Numbers of devices that the heads can be shared among, fewest first. Raises InputError for another."""
    most = NODE if gpu.link else 1
    known = [count for count in range(1, most + 1) if divides(count, config)]
    if asked is None:
        return known
    if asked not in known:
        raise InputError(
            f"tensor_parallel_size is {asked}; {config.num_heads} heads, {config.num_kv_heads} for keys and "
            f"values, go on {', '.join(map(str, known))} of {gpu.name}"
        )
    return [asked]


def _replicas(replica: Replica) -> int:
    return ceil(replica.demand.rps / (replica.terms.load * replica.rate(replica.most)))


def _why_not(largest: Replica) -> str:
    place = f"{largest.shares} x {largest.gpu.name}" if largest.gpu.link else f"this {largest.gpu.name}"
    limit, gib = largest.terms.tpot, 1 << 30
    if limit is not None and replace(largest, terms=replace(largest.terms, tpot=None)).most:
        return f"tpot_ms is {1e3 * limit:g}; on {place} one request takes {1e3 * largest.tpot(1):.3g} a token"
    needed = largest.held + largest.shares * largest.workspace + largest.kv_request
    there = largest.shares * largest.gpu.memory * largest.terms.memory
    return (
        f"the model does not fit: weights, the largest step and one request take {needed / gib:.3g} GiB, and "
        f"of {place}, the most that it can be shared among, {there / gib:.3g} may be used"
    )
