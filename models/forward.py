"""One forward pass over a packed (ragged) batch of many branches."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from ..kernels.attention_metadata import RaggedBatch, SequenceChunk
from ..kernels.common.transfer import to_device
from ..kernels.cpu.row_padding import pad_rows

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from ..kernels.backend import KVCache
    from .decoder import Decoder


def forward(
    model: Decoder,
    chunks: list[SequenceChunk],
    token_ids: Sequence[int],
    rope_lengths: Sequence[int],
    cache: KVCache,
    prev_tokens: Tensor | None = None,
) -> Tensor:
    """Hidden states of the tokens, followed by padding rows: [rows, hidden].

    rope_lengths: for each token its request's `Rope.rope_length`; used only with dynamic RoPE.
    prev_tokens [tokens] on the device: if not None, token_ids are indices into it.
    """
    columns = [pad_rows(token_ids, model.device)]
    if model.config.rope.rope_type == "dynamic":
        columns.append(pad_rows(rope_lengths, model.device))
    batch = RaggedBatch.from_chunks(chunks, cache.block_size, len(columns[0]) - len(token_ids), model.device)
    cache.prepare(batch)
    ids, *row_rope_lengths = to_device(model.device, *(np.array(column, np.int64) for column in columns))
    if prev_tokens is not None:
        ids = prev_tokens[ids]
    return model.forward(ids, batch.positions, cache, *row_rope_lengths)
