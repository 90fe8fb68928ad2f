"""Decode steps as CUDA graphs: captured for some sizes at the start, then replayed in one launch.

A layer of a decoder is a dozen launches, each of which costs the host about as much as the device needs for
it. A step in which every branch has one token always launches the same with other numbers: it is captured for
some numbers of rows and some longest texts, and a step takes the smallest that holds it. Rows that only fill
it up are tokens at position 0 which are written to the cache's spare page and read it alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ...kernels.common.transfer import pack_pinned, unpack_views
from ...kernels.reference.paged_kv_cache import AttentionMetadata, PagedKVCache

if TYPE_CHECKING:
    from ...kernels.attention_metadata import SequenceChunk
    from ...models.decoder import Decoder

CaptureFn = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]
"""Makes of a call another that does the same again with the same tensors."""
InputArrays = list["np.ndarray[Any, Any]"]

MAX_BATCH_SIZE, MAX_SEQ_LEN = 256, 32_768
"""Beyond so many rows, and tokens of a text, a step is not captured: it would keep memory for all of them."""
MIN_SEQ_LEN, SEQ_LEN_FACTOR = 1024, 4
"""The first length that steps are captured for, and how many times as long the next is."""


def capture_batch_sizes(max_batch_size: int) -> list[int]:
    """Numbers of rows that steps are captured for: 1, 2, 4, 8, 16, then each half as much again or a third.

    Rows that fill a step up read one key each, and its weights are read for all rows at once.
    """
    max_batch_size = min(max_batch_size, MAX_BATCH_SIZE)
    sizes = {1, 2, 4, 8, 16, *(factor << exponent for exponent in range(3, 8) for factor in (3, 4))}
    return sorted({size for size in sizes if size < max_batch_size} | {max_batch_size})


def capture_seq_lens(max_seq_len: int) -> list[int]:
    """Longest texts that steps are captured for, each four times the one before.

    A length decides how many programs are launched for a row; those beyond its text end at once.
    """
    max_seq_len, seq_lens = min(max_seq_len, MAX_SEQ_LEN), []
    seq_len = MIN_SEQ_LEN
    while seq_len < max_seq_len:
        seq_lens.append(seq_len)
        seq_len *= SEQ_LEN_FACTOR
    return [*seq_lens, max_seq_len]


@dataclass(frozen=True)
class _CapturedGraph:
    """One size of step: the bytes that all its inputs lie in, and what runs it to its hidden states.

    input_ids [rows]: the tokens among them. metadata: kept since its kernels read it, of which nothing else
    knows once they are captured.
    """

    input_buffer: Tensor
    input_ids: Tensor
    metadata: AttentionMetadata
    replay: Callable[[], Tensor]


class CUDAGraphRunner:
    """All that is captured of one model and cache. `capture` is `captured` on a GPU.

    Raises torch.cuda.OutOfMemoryError, as what is captured keeps its memory.
    """

    def __init__(
        self,
        model: Decoder,
        cache: PagedKVCache,
        max_num_seqs: int,
        max_model_len: int,
        capture: CaptureFn,
    ) -> None:
        self._model, self._cache = model, cache
        self._batch_sizes, self._seq_lens = capture_batch_sizes(max_num_seqs), capture_seq_lens(max_model_len)
        self._dynamic_rope = model.config.rope.rope_type == "dynamic"
        # the largest first: its memory serves the others
        sizes = [
            (batch_size, seq_len)
            for batch_size in reversed(self._batch_sizes)
            for seq_len in reversed(self._seq_lens)
        ]
        self._graphs = {size: self._capture_graph(*size, capture) for size in sizes}

    @property
    def num_graphs(self) -> int:
        """How many sizes there are."""
        return len(self._graphs)

    def run(
        self,
        chunks: Sequence[SequenceChunk],
        token_ids: Sequence[int],
        rope_lengths: Sequence[int],
        prev_tokens: Tensor | None = None,
    ) -> Tensor | None:
        """Hidden states of the tokens and of what fills them up, [rows, hidden], until the next run.

        prev_tokens [tokens] on the device: where given, token_ids are places among these.
        None for a step that is not captured: with a prompt in it, or larger than all that are.
        """
        max_seq_len = max(chunk.num_computed for chunk in chunks) + 1
        batch_size = next((size for size in self._batch_sizes if size >= len(chunks)), 0)
        seq_len = next((size for size in self._seq_lens if size >= max_seq_len), 0)
        if not batch_size or not seq_len or any(segment.num_new > 1 for segment in chunks):
            return None
        graph = self._graphs[batch_size, seq_len]
        arrays = self._padding_arrays(batch_size, seq_len)
        self._fill_arrays(arrays, chunks, token_ids, rope_lengths)
        graph.input_buffer.copy_(pack_pinned(self._model.device, arrays), non_blocking=True)
        if prev_tokens is not None:
            graph.input_ids.copy_(prev_tokens[graph.input_ids])
        return graph.replay()

    def _padding_arrays(self, batch_size: int, seq_len: int) -> InputArrays:
        """Ids, positions, pages, offsets, what a rope turns by, starts and tables of rows that fill up."""
        arrays: InputArrays = [np.zeros(batch_size, np.int64) for _ in range(5)]
        arrays[2][:] = self._cache.padding_block
        block_tables = np.full(
            (batch_size, -(-seq_len // self._cache.block_size)), self._cache.padding_block, np.int32
        )
        return [*arrays, np.zeros(batch_size, np.int32), block_tables]

    def _fill_arrays(
        self,
        arrays: InputArrays,
        chunks: Sequence[SequenceChunk],
        token_ids: Sequence[int],
        chunk_rope_lengths: Sequence[int],
    ) -> None:
        input_ids, positions, block_ids, block_offsets, rope_lengths, context_lens, block_tables = arrays
        num_tokens, block_size = len(chunks), self._cache.block_size
        input_ids[:num_tokens], rope_lengths[:num_tokens] = token_ids, chunk_rope_lengths
        positions[:num_tokens] = context_lens[:num_tokens] = [chunk.num_computed for chunk in chunks]
        block_offsets[:num_tokens] = positions[:num_tokens] % block_size
        block_ids[:num_tokens] = [
            segment.block_table[segment.num_computed // block_size] for segment in chunks
        ]
        for table_row, segment in zip(block_tables, chunks, strict=False):
            block_table = segment.block_table[: segment.num_computed // block_size + 1]
            table_row[: len(block_table)] = block_table

    def _capture_graph(self, batch_size: int, seq_len: int, capture: CaptureFn) -> _CapturedGraph:
        arrays, model, cache = self._padding_arrays(batch_size, seq_len), self._model, self._cache
        input_buffer = pack_pinned(model.device, arrays).to(model.device)
        input_ids, positions, block_ids, block_offsets, rope_buffer, context_lens, block_tables = (
            unpack_views(input_buffer, arrays)
        )
        metadata = AttentionMetadata.for_decode(block_ids, block_offsets, context_lens, block_tables, seq_len)
        rope_lengths = rope_buffer if self._dynamic_rope else None

        def run_model() -> Tensor:
            cache.metadata = metadata
            return model.forward(input_ids, positions, cache, rope_lengths)

        return _CapturedGraph(input_buffer, input_ids, metadata, capture(run_model))


def make_graph_capturer() -> CaptureFn:
    """Captures on the current GPU; all that one captures shares its memory, so one result holds at a time."""
    pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    def capture(run_model: Callable[[], Tensor]) -> Callable[[], Tensor]:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            # kernels are compiled and libraries open their handles here: a capture allows neither
            run_model()
            torch.cuda.synchronize()
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                hidden = run_model()
            except BaseException:
                with suppress(RuntimeError):  # what ended the capture is what there is to be told
                    graph.capture_end()
                raise
            graph.capture_end()

        def replay() -> Tensor:
            graph.replay()
            return hidden

        return replay

    return capture
