"""Masks of the vocabulary: which tokens a request may choose, whatever their scores.

`MASKS` lists them; to add one, write its columns, its function and its `Mask` here, and its Triton part in
`kernels.triton.steering.masks`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .feature import HeadOutput, Mask, MaskInput


@dataclass(frozen=True)
class MaskColumns:
    """The masks' columns of the state.

    mask_top_p:    only tokens in this nucleus of softmax(z_1 / mask_temperature) are allowed. 1 is off.
    """

    mask_top_p: float = 1.0
    mask_temperature: float = 1.0


def outside_nucleus(step: MaskInput) -> tuple[Tensor, Tensor]:
    """Tokens outside the nucleus of the last branch, the only objective branch (Linear Alignment)."""
    layout, params = step.layout, step.params
    requests = (params["mask_top_p"] < 1).nonzero()[:, 0]
    last_rows = layout.row_start[requests] + layout.num_rows[requests] - 1
    logits = step.logits[last_rows] / params["mask_temperature"][requests, None].to(step.logits.dtype)
    logits[:, step.vocab_size :] = -torch.inf
    return requests, logits < step.shard.nucleus_threshold(logits, params["mask_top_p"][requests])


NUCLEUS_MASK = Mask(
    is_used=lambda columns: columns["mask_top_p"] < 1,
    warmup={"mask_top_p": 0.9},
    head_output=HeadOutput.BRANCHES,
    find_forbidden=outside_nucleus,
)
MASKS = (NUCLEUS_MASK,)
