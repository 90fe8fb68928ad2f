"""What the requests of a step ask for, as the host knows it without asking the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .state import GREEDY_BELOW

if TYPE_CHECKING:
    from .state import Groups, SteerTable


@dataclass(frozen=True)
class Features:
    """What any request of a step has, from what the host admitted."""

    delayed: bool
    limited: bool
    masked: bool
    rewarded: bool
    top_k: bool
    top_p: bool
    min_p: bool

    @property
    def filtered(self) -> bool:
        return self.top_k or self.top_p or self.min_p

    @classmethod
    def of(cls, groups: Groups, table: SteerTable) -> Features:
        rows = groups.rows or tuple(table.admitted)
        programs = [table.admitted[row][0] for row in rows]
        warm = [draw for draw in (table.admitted[row][1] for row in rows) if draw.temperature >= GREEDY_BELOW]
        return cls(
            delayed=any(program.delay for program in programs),
            limited=any(program.kl_budget < float("inf") for program in programs),
            masked=any(program.mask_top_p < 1 for program in programs),
            rewarded=any(program.reward for program in programs),
            top_k=any(draw.top_k > 0 for draw in warm),
            top_p=any(draw.top_p < 1 for draw in warm),
            min_p=any(draw.min_p > 0 for draw in warm),
        )
