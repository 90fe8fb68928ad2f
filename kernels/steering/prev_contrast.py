"""OPAD's term: the contrast z_1 − z_0 of the previous step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from .feature import Feature, HeadOutput

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from .layout import RequestLayout


@dataclass(frozen=True)
class PrevContrastColumns:
    """prev_contrast_coef: OPAD's g. The previous step's contrast is added g times, and the first step takes
    the objective branches alone. 0 is off.
    """

    prev_contrast_coef: float = 0.0


def add_prev_contrast(
    logits: Tensor,
    layout: RequestLayout,
    params: Mapping[str, Tensor],
    prev_contrast: Tensor,
    slots: Tensor,
    steps: Tensor,
    scores: Tensor,
) -> None:
    """OPAD: adds g times the previous step's z_1 − z_0 to the scores, and stores this step's.

    prev_contrast [slots, vocab]; slots [requests]: the request's row of it.
    """
    for request in (params["prev_contrast_coef"] != 0).nonzero()[:, 0].tolist():
        slot, base_row = int(slots[request]), int(layout.row_start[request])
        if steps[request] > 0:
            scores[request] += params["prev_contrast_coef"][request].to(scores.dtype) * prev_contrast[slot]
        prev_contrast[slot] = logits[base_row + 1] - logits[base_row]


PREV_CONTRAST = Feature(
    is_used=lambda columns: columns["prev_contrast_coef"] != 0,
    warmup={"prev_contrast_coef": 1.0},
    head_output=HeadOutput.BRANCHES,
)
