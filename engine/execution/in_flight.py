"""A step on its way: the device works at it, and the host need not know yet what it chooses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ...kernels.steering.step import SamplerOutput
    from ..scheduling.scheduler import SchedulerOutput


@dataclass(frozen=True)
class InFlightStep:
    """A plan that is being carried out. land: waits for the choice of each ready group, in their order.

    The choice is on the host; None for a plan with no group ready.
    """

    scheduler_output: SchedulerOutput
    result: Callable[[], SamplerOutput | None]

    @property
    def abandoned(self) -> bool:
        """Whether nobody is left to have what it chooses."""
        return not any(group.is_active for group in self.scheduler_output.to_sample)
