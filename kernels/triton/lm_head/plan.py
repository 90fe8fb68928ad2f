"""How one step's product is made and what it leaves, from what the host knows of the step's requests."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import triton

from ..configs import TUNING, Tile, Tuning

if TYPE_CHECKING:
    from ...steering.features import Features
    from ...steering.state import Groups, SteerTable

"""By counted bytes and compiled code, not timed: within 64 rows the weights are read once and the product
waits for memory; a second tile of rows would read them again, through a cache that is hardly fast enough."""


@dataclass(frozen=True)
class Plan:
    """blended: hidden states are mixed before the product, to one row a request. stored: rows are kept for
    the launches of `steer`, `kept` a request; else the product's launch finds each tile's best token.
    normalised: (max, Σ exp) of every row are wanted. slots: places for a request's rows in a tile of `rows`.
    """

    blended: bool
    stored: bool
    normalised: bool
    slots: int
    rows: int
    groups: int
    tile: Tile = field(repr=False)

    @property
    def kept(self) -> int:
        return (1 if self.blended else 2) if self.stored else 0

    @property
    def row_tiles(self) -> int:
        return -(-self.groups // (self.rows // self.slots))

    def tiles(self, vocab: int) -> int:
        return -(-vocab // self.tile.tokens)

    def bytes(self, rows: int, vocab: int, width: int, itemsize: int) -> int:
        """The least that the product's launch moves: weights once, hidden states, what it leaves."""
        stats = 8 * rows * self.tiles(vocab) if self.normalised else 0
        left = 4 * self.kept * vocab if self.stored else 12 * self.tiles(vocab)
        return (vocab + self.given(rows)) * width * itemsize + stats + self.groups * left

    def flops(self, rows: int, vocab: int, width: int) -> int:
        """The least that the product computes: rows that only fill a tile up do not count."""
        return 2 * self.given(rows) * vocab * width

    def given(self, rows: int) -> int:
        """Hidden states that are multiplied: a blended one is a pair, of its high and its low digits."""
        return 2 * self.groups if self.blended else rows

    @classmethod
    def of(
        cls,
        features: Features,
        groups: Groups,
        table: SteerTable,
        *,
        trace: bool,
        top: bool,
        edited: bool,
        tuning: Tuning = TUNING,
    ) -> Plan | None:
        """None where the vocabulary's product and `steer` are better done one after the other.

        The divergence is measured, and edits, filters and the likeliest tokens are made of stored rows.
        """
        held = features.limited or features.masked or features.delayed
        blended = not (trace or top or features.rewarded or held)
        slots = 1 if blended else triton.next_power_of_2(groups.width)
        size = len(groups.table)
        if size * slots > tuning.most_rows or slots > max(tuning.tiles):
            return None
        if (features.masked or features.delayed) and groups.width > 2:  # they look at more than two rows keep
            return None
        rows = tuning.rows(size * slots, slots)
        return cls(
            blended=blended,
            stored=held or features.filtered or top or edited or (trace and _on_rays(groups, table)),
            normalised=trace or features.rewarded,
            slots=slots,
            rows=rows,
            groups=size,
            tile=tuning.tiles[rows],
        )


def _on_rays(groups: Groups, table: SteerTable) -> bool:
    """Whether a request's scores may be of the form b + a (m − b), so that a trace has its divergence."""
    programs = [table.admitted[row][0] for row in groups.rows or tuple(table.admitted)]
    rays = any(program.base == 1 - program.scale and not program.delay for program in programs)
    return rays and groups.width > 1
