"""How many engines there are on a Ray cluster, and what each of them takes."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields

from ...engine.utils.fields import check_fields, option, require_fields
from ...kernels.common.errors import InputError, quoted


@dataclass(frozen=True)
class RayConfig:
    """What of the command line is about Ray. Every field is a flag of the same name."""

    ray: bool = option(False, "run on the Ray cluster of RAY_ADDRESS, or on one started here")
    replicas: str = option("1", "engines on the cluster: N, or MIN:MAX, as many as the waiting requests need")
    replica_cpus: float = option(1.0, "CPU cores of each engine")
    replica_gpus: float | None = option(
        None, "GPUs of each engine; none takes one where the cluster has any and device is not cpu"
    )

    def __post_init__(self) -> None:
        check_fields(self)
        require_fields(
            self,
            ("replicas", self._counts_are_right(), "a whole number ≥ 1, or two such as 1:4"),
            ("replica_cpus", 0 <= self.replica_cpus < 1e6, "a number ≥ 0"),
            ("replica_gpus", self.replica_gpus is None or 0 <= self.replica_gpus < 1e6, "a number ≥ 0"),
        )
        for each in fields(self):
            if not self.ray and getattr(self, each.name) != each.default:
                value = quoted(getattr(self, each.name))
                raise InputError(f"{each.name} is {value}, which is about Ray; give --ray, too", each.name)

    @property
    def least(self) -> int:
        """Engines that there always are."""
        return int(self.replicas.partition(":")[0])

    @property
    def most(self) -> int:
        """Engines that there may be."""
        return int(self.replicas.rpartition(":")[2])

    def _counts_are_right(self) -> bool:
        found = re.fullmatch(r"[1-9]\d{0,5}(:[1-9]\d{0,5})?", self.replicas)
        return found is not None and self.least <= self.most
