"""Settings of Ray: the number of engines on the cluster, and the resources of each."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields

from ...engine.utils.fields import config_field, validate_rules, validate_types
from ...kernels.common.errors import InputError, short_repr


@dataclass(frozen=True)
class RayConfig:
    """Ray settings of the command line. Every field is a flag of the same name."""

    ray: bool = config_field(False, "run on the Ray cluster of RAY_ADDRESS, or on one started here")
    replicas: str = config_field(
        "1", "engines on the cluster: N, or MIN:MAX to scale with the waiting requests"
    )
    replica_cpus: float = config_field(1.0, "CPU cores of each engine")
    replica_gpus: float | None = config_field(
        None, "GPUs of each engine; none is 1 if the cluster has any and device is not cpu, else 0"
    )

    def __post_init__(self) -> None:
        validate_types(self)
        validate_rules(
            self,
            ("replicas", self._is_valid_range(), "an integer ≥ 1, or a range such as 1:4"),
            ("replica_cpus", 0 <= self.replica_cpus < 1e6, "a number ≥ 0"),
            ("replica_gpus", self.replica_gpus is None or 0 <= self.replica_gpus < 1e6, "a number ≥ 0"),
        )
        for field in fields(self):
            if not self.ray and getattr(self, field.name) != field.default:
                value = short_repr(getattr(self, field.name))
                raise InputError(f"{field.name} is {value}, which needs --ray", field.name)

    @property
    def min_replicas(self) -> int:
        """Minimum number of engines."""
        return int(self.replicas.partition(":")[0])

    @property
    def max_replicas(self) -> int:
        """Maximum number of engines."""
        return int(self.replicas.rpartition(":")[2])

    def _is_valid_range(self) -> bool:
        match = re.fullmatch(r"[1-9]\d{0,5}(:[1-9]\d{0,5})?", self.replicas)
        return match is not None and self.min_replicas <= self.max_replicas
