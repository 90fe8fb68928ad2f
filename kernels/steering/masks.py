"""Masks of the vocabulary: which tokens a request may choose, whatever their scores.

`MASKS` lists them; to add one, write its columns, its function and its `Mask` here, and its Triton part in
`kernels.triton.steering.masks`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from .feature import HeadOutput, Mask, MaskInput

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class MaskColumns:
    """The masks' columns of the state.

    mask_top_p:    only tokens in this nucleus of softmax(z_1 / mask_temperature) are allowed. 1 is off.
    relative_top:  ρ: only tokens are allowed whose probability is at least ρ times the largest in some branch
                   with a coefficient above 0, the base branch included. 0 is off.
    """

    mask_top_p: float = 1.0
    mask_temperature: float = 1.0
    relative_top: float = 0.0


def outside_nucleus(step: MaskInput) -> tuple[Tensor, Tensor]:
    """Tokens outside the nucleus of the last branch, the only objective branch (Linear Alignment)."""
    layout, params = step.layout, step.params
    requests = (params["mask_top_p"] < 1).nonzero()[:, 0]
    last_rows = layout.row_start[requests] + layout.num_rows[requests] - 1
    logits = step.logits[last_rows] / params["mask_temperature"][requests, None].to(step.logits.dtype)
    logits[:, step.vocab_size :] = -math.inf
    return requests, logits < step.shard.nucleus_threshold(logits, params["mask_top_p"][requests])


def below_relative_top(step: MaskInput) -> tuple[Tensor, Tensor]:
    """Tokens that are less likely than ρ times the likeliest in every branch with a positive coefficient."""
    layout, vocab_size = step.layout, step.vocab_size
    requests = (step.params["relative_top"] > 0).nonzero()[:, 0]
    coefs = step.coefs.to(step.logits.dtype)  # as they are multiplied
    max_logits = step.shard.amax(step.logits[:, :vocab_size])
    floor = max_logits + step.params["relative_top"].to(max_logits.dtype).log()[layout.request_of_row]
    floor = floor.where(coefs > 0, math.inf)  # another branch allows nothing
    stacked, floors = layout.stack(step.logits), layout.stack(floor)
    any_positive = (layout.stack(coefs) > 0).any(1)
    if len(requests) < len(any_positive):
        stacked, floors, any_positive = stacked[requests], floors[requests], any_positive[requests]
    forbidden = any_positive[:, None].expand(-1, stacked.shape[-1]).clone()
    for place in range(layout.max_rows):
        forbidden &= stacked[:, place] < floors[:, place, None]
    return requests, forbidden


NUCLEUS_MASK = Mask(
    is_used=lambda columns: columns["mask_top_p"] < 1,
    warmup={"mask_top_p": 0.9},
    head_output=HeadOutput.BRANCHES,
    find_forbidden=outside_nucleus,
)
RELATIVE_TOP = Mask(
    is_used=lambda columns: columns["relative_top"] > 0,
    warmup={"relative_top": 0.1},
    head_output=HeadOutput.BRANCHES,
    find_forbidden=below_relative_top,
    in_trust_region=True,
)
MASKS = NUCLEUS_MASK, RELATIVE_TOP
