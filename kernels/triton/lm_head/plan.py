"""Host-side plan of one fused LM head launch: whether to fuse, tile shape, stored rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ...steering.feature import HeadOutput
from ..configs import DEFAULT_LM_HEAD_CONFIG, LMHeadConfig, LMHeadTile, next_power_of_2

if TYPE_CHECKING:
    from ...steering.feature import StepFeatures
    from ...steering.layout import RequestLayout
    from ...steering.state import SteeringState


@dataclass(frozen=True)
class FusedPlan:
    """mix_before_head: mix hidden states before the LM head, to one row per request. materialize: store
    `rows_stored` rows per request for the launches of `steer`; otherwise `lm_head_kernel` selects the best
    token of each tile. branch_logprobs: also compute (max, Σ exp) of every row. branch_slots: slots for the
    branches of one request in a tile of `tile_rows` rows.
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
        """Minimum memory traffic of `lm_head_kernel`: weights once, hidden states, outputs."""
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
        """Minimum FLOPs of the matrix product, without padding rows."""
        return 2 * self.gemm_rows(num_rows) * vocab_size * hidden_size

    def gemm_rows(self, num_rows: int) -> int:
        """Rows of the matrix product; a mixed hidden state is a pair of rows, its high and low bits."""
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
        """None where a separate logits product followed by `steer` is better.

        Measured KL, edits, filters and top log-probabilities need stored rows.
        """
        head_output, branch_logprobs = features.head_output, trace or features.branch_logprobs
        mix_before_head = not (top or branch_logprobs or head_output > HeadOutput.SCORES)
        branch_slots = 1 if mix_before_head else next_power_of_2(layout.max_rows)
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
    """Whether the scores of any request may have the form b + a (m − b), so that a trace measures its KL."""
    coefficients = [state.host_params[row][0] for row in layout.host_state_rows or tuple(state.host_params)]
    any_on_ray = any(
        coefs.base_coef == 1 - coefs.objective_coef and not coefs.prev_contrast_coef for coefs in coefficients
    )
    return any_on_ray and layout.max_rows > 1
