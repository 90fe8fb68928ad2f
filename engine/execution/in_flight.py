"""Handle to a launched step whose result may still be on the device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ...kernels.steering.step import SamplerOutput
    from ..scheduling.scheduler import SchedulerOutput


@dataclass(frozen=True)
class InFlightStep:
    """A launched step. result: waits for the sampled tokens of `to_sample`, in that order, on the host.

    It returns None for a step that samples no group.
    """

    scheduler_output: SchedulerOutput
    result: Callable[[], SamplerOutput | None]

    @property
    def abandoned(self) -> bool:
        """Whether no group that it samples is active any more."""
        return not any(group.is_active for group in self.scheduler_output.to_sample)
