"""How the fused LM head of one step is launched and what it stores, decided on the host."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import triton

from ...steering.feature import HeadOutput
from ..configs import DEFAULT_LM_HEAD_CONFIG, LMHeadConfig, LMHeadTile

if TYPE_CHECKING:
    from ...steering.feature import StepFeatures
    from ...steering.layout import RequestLayout
    from ...steering.state import SteeringState

"""By counted bytes and compiled code, not timed: within 64 rows the weights are read once and the product
waits for memory; a second tile of rows would read them again, through a cache that is hardly fast enough."""


@dataclass(frozen=True)
class FusedPlan:
    """blended: hidden states are mixed before the product, to one row a request. materialize: rows are kept
    for the launches of `steer`, `rows_stored` a request; else the product's launch finds each tile's best
    token. branch_logprobs: (max, Σ exp) of every row are wanted. branch_slots: places for a request's rows
    in a tile of `tile_rows`.
    """

    mix_before_head: bool
    materialize: bool
    branch_logprobs: bool
    branch_slots: int
    tile_rows: int
    num_reqs: int
    tile: LMHeadTile = field(repr=False)

    @property
    def rows_stored(self) -> int:
        return (1 if self.mix_before_head else 2) if self.materialize else 0

    @property
    def num_row_tiles(self) -> int:
        return -(-self.num_reqs // (self.tile_rows // self.branch_slots))

    def num_vocab_tiles(self, vocab_size: int) -> int:
        return -(-vocab_size // self.tile.tokens)

    def bytes_moved(self, num_rows: int, vocab_size: int, hidden_size: int, itemsize: int) -> int:
        """The least that the product's launch moves: weights once, hidden states, what it leaves."""
        stats_bytes = 8 * num_rows * self.num_vocab_tiles(vocab_size) if self.branch_logprobs else 0
        output_bytes = (
            4 * self.rows_stored * vocab_size if self.materialize else 12 * self.num_vocab_tiles(vocab_size)
        )
        return (
            (vocab_size + self.gemm_rows(num_rows)) * hidden_size * itemsize
            + stats_bytes
            + self.num_reqs * output_bytes
        )

    def flops(self, num_rows: int, vocab_size: int, hidden_size: int) -> int:
        """The least that the product computes: rows that only fill a tile up do not count."""
        return 2 * self.gemm_rows(num_rows) * vocab_size * hidden_size

    def gemm_rows(self, num_rows: int) -> int:
        """Hidden states that are multiplied: a blended one is a pair, of its high and its low digits."""
        return 2 * self.num_reqs if self.mix_before_head else num_rows

    @classmethod
    def from_features(
        cls,
        features: StepFeatures,
        layout: RequestLayout,
        state: SteeringState,
        *,
        trace: bool,
        top: bool,
        has_edits: bool,
        config: LMHeadConfig = DEFAULT_LM_HEAD_CONFIG,
    ) -> FusedPlan | None:
        """None where the vocabulary's product and `steer` are better done one after the other.

        The divergence is measured, and edits, filters and the likeliest tokens are made of stored rows.
        """
        head_output, branch_logprobs = features.head_output, trace or features.branch_logprobs
        mix_before_head = not (top or branch_logprobs or head_output > HeadOutput.SCORES)
        branch_slots = 1 if mix_before_head else triton.next_power_of_2(layout.max_rows)
        num_reqs = len(layout.state_rows)
        if num_reqs * branch_slots > config.max_rows or branch_slots > max(config.tiles):
            return None
        if head_output == HeadOutput.BRANCHES and layout.max_rows > 2:  # two rows are stored
            return None
        tile_rows = config.tile_rows(num_reqs * branch_slots, branch_slots)
        return cls(
            mix_before_head=mix_before_head,
            materialize=head_output > HeadOutput.TOKEN
            or top
            or has_edits
            or (trace and _any_on_ray(layout, state)),
            branch_logprobs=branch_logprobs,
            branch_slots=branch_slots,
            tile_rows=tile_rows,
            num_reqs=num_reqs,
            tile=config.tiles[tile_rows],
        )


def _any_on_ray(layout: RequestLayout, state: SteeringState) -> bool:
    """Whether a request's scores may be of the form b + a (m − b), so that a trace has its divergence."""
    coefficients = [state.host_params[row][0] for row in layout.host_state_rows or tuple(state.host_params)]
    any_on_ray = any(
        coefs.base_coef == 1 - coefs.objective_coef and not coefs.prev_contrast_coef for coefs in coefficients
    )
    return any_on_ray and layout.max_rows > 1
