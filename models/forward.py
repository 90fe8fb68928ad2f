"""One forward over the tokens of many branches, each at its own place."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..kernels.attention_metadata import Batch, Segment
from ..kernels.common.transfer import send
from ..kernels.cpu.linear import filled

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from ..kernels.backend import Cache
    from .llama import Llama


def forward(
    model: Llama,
    segments: list[Segment],
    token_ids: Sequence[int],
    turned_by: Sequence[int],
    cache: Cache,
    chosen: Tensor | None = None,
) -> Tensor:
    """Hidden states of the tokens, and of rows that only fill the batch up: [rows, hidden].

    turned_by: for each token what its request turns by, which matters where the model's rope is dynamic.
    chosen [tokens] on the device: where given, token_ids are places among these.
    """
    columns = [filled(token_ids, model.device)]
    if model.config.rope.kind == "dynamic":
        columns.append(filled(turned_by, model.device))
    batch = Batch.of(segments, cache.block_size, len(columns[0]) - len(token_ids), model.device)
    cache.begin(batch)
    ids, *lengths = send(model.device, *(np.array(column, np.int64) for column in columns))
    if chosen is not None:
        ids = chosen[ids]
    return model.forward(ids, batch.positions, cache, *lengths)
