"""Which steering and sampling features a step uses, as known on the host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .state import GREEDY_BELOW

if TYPE_CHECKING:
    from .state import RequestLayout, SteeringState


@dataclass(frozen=True)
class StepFeatures:
    """Features used by any request of a step, from the state's host copy of the parameters."""

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
            has_kl_budget=any(coef.kl_budget < float("inf") for coef in coefs),
            has_nucleus_mask=any(coef.mask_top_p < 1 for coef in coefs),
            has_rewards=any(coef.reward_rate for coef in coefs),
            top_k=any(sampling.top_k > 0 for sampling in random),
            top_p=any(sampling.top_p < 1 for sampling in random),
            min_p=any(sampling.min_p > 0 for sampling in random),
        )
