"""Which steering and sampling features a step uses, as known on the host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .state import GREEDY_BELOW

if TYPE_CHECKING:
    from .state import RequestLayout, SteeringState


@dataclass(frozen=True)
class StepFeatures:
    """What any request of a step has, from what the host admitted."""

    uses_prev_contrast: bool
    has_kl_budget: bool
    has_nucleus_mask: bool
    has_rewards: bool
    top_k: bool
    top_p: bool
    min_p: bool

    @property
    def has_truncation(self) -> bool:
        return self.top_k or self.top_p or self.min_p

    @classmethod
    def from_layout(cls, layout: RequestLayout, state: SteeringState) -> StepFeatures:
        state_rows = layout.host_state_rows or tuple(state.host_params)
        coefs = [state.host_params[row][0] for row in state_rows]
        random = [
            sampling
            for sampling in (state.host_params[row][1] for row in state_rows)
            if sampling.temperature >= GREEDY_BELOW
        ]
        return cls(
            uses_prev_contrast=any(coef.prev_contrast_coef for coef in coefs),
            has_kl_budget=any(program.kl_budget < float("inf") for program in coefs),
            has_nucleus_mask=any(program.mask_top_p < 1 for program in coefs),
            has_rewards=any(program.reward_rate for program in coefs),
            top_k=any(draw.top_k > 0 for draw in random),
            top_p=any(draw.top_p < 1 for draw in random),
            min_p=any(draw.min_p > 0 for draw in random),
        )
