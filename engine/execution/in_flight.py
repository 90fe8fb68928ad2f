"""A handle to a step that was launched and whose result may not be known yet."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ...kernels.steering.step import SamplerOutput
    from ..scheduling.scheduler import SchedulerOutput


@dataclass(frozen=True)
class InFlightStep:
    """A plan that is being carried out. result: waits for the choice of each ready group, in their order.

    The choice is on the host; None for a plan with no group ready.
    """

    scheduler_output: SchedulerOutput
    result: Callable[[], SamplerOutput | None]

    @property
    def abandoned(self) -> bool:
        """Whether nobody is left to have what it chooses."""
        return not any(group.is_active for group in self.scheduler_output.to_sample)
