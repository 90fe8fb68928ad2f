"""CUDA graphs of decode steps: captured for a set of batch shapes at the start, replayed in one launch.

A decoder layer is a dozen launches, and each costs the host about as much time as the device. A step in which
every branch has one token always launches the same kernels: it is captured for several batch sizes and
maximum sequence lengths, and a step replays the smallest graph that fits. Padding rows are tokens at position
0 that write to the cache's padding block and read only that block.
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
"""Captures a call; the result replays it on the same tensors."""
InputArrays = list["np.ndarray[Any, Any]"]

MAX_BATCH_SIZE, MAX_SEQ_LEN = 256, 32_768
"""Larger batches and longer sequences are not captured: a graph keeps the memory of its largest inputs."""
MIN_SEQ_LEN, SEQ_LEN_FACTOR = 1024, 4
"""The first captured sequence length, and the ratio of each length to the one before."""


def capture_batch_sizes(max_batch_size: int) -> list[int]:
    """Batch sizes to capture: 1, 2, 4, 8, 16, then each 1/2 or 1/3 larger than the one before.

    Padding is cheap: a padding row reads one key, and the weights are read once for all rows.
    """
    max_batch_size = min(max_batch_size, MAX_BATCH_SIZE)
    sizes = {1, 2, 4, 8, 16, *(factor << exponent for exponent in range(3, 8) for factor in (3, 4))}
    return sorted({size for size in sizes if size < max_batch_size} | {max_batch_size})


def capture_seq_lens(max_seq_len: int) -> list[int]:
    """Maximum sequence lengths to capture, each four times the one before.

    The length sets the number of programs per row; those beyond the row's sequence exit at once.
    """
    max_seq_len, seq_lens = min(max_seq_len, MAX_SEQ_LEN), []
    seq_len = MIN_SEQ_LEN
    while seq_len < max_seq_len:
        seq_lens.append(seq_len)
        seq_len *= SEQ_LEN_FACTOR
    return [*seq_lens, max_seq_len]


@dataclass(frozen=True)
class _CapturedGraph:
    """One captured batch shape: the buffer of all its inputs, and the replay that returns hidden states.

    input_ids [rows]: the token ids, a view of the buffer. metadata: only keeps alive the tensors that the
    captured kernels read.
    """

    input_buffer: Tensor
    input_ids: Tensor
    metadata: AttentionMetadata
    replay: Callable[[], Tensor]


class CUDAGraphRunner:
    """The CUDA graphs of one model and cache. `capture` is a `make_graph_capturer()` on a GPU.

    Raises torch.cuda.OutOfMemoryError: graphs keep their memory.
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
        # the largest first: smaller graphs reuse its memory pool
        sizes = [
            (batch_size, seq_len)
            for batch_size in reversed(self._batch_sizes)
            for seq_len in reversed(self._seq_lens)
        ]
        self._graphs = {size: self._capture_graph(*size, capture) for size in sizes}

    @property
    def num_graphs(self) -> int:
        """Number of captured graphs."""
        return len(self._graphs)

    def run(
        self,
        chunks: Sequence[SequenceChunk],
        token_ids: Sequence[int],
        rope_lengths: Sequence[int],
        prev_tokens: Tensor | None = None,
    ) -> Tensor | None:
        """Hidden states of the tokens and the padding rows, [rows, hidden], valid until the next run.

        prev_tokens [tokens] on the device: if not None, token_ids are indices into it.
        Returns None for a step without a graph: one with a prefill, or larger than all captured shapes.
        """
        max_seq_len = max(chunk.num_computed for chunk in chunks) + 1
        batch_size = next((size for size in self._batch_sizes if size >= len(chunks)), 0)
        seq_len = next((size for size in self._seq_lens if size >= max_seq_len), 0)
        if not batch_size or not seq_len or any(chunk.num_new > 1 for chunk in chunks):
            return None
        graph = self._graphs[batch_size, seq_len]
        arrays = self._padding_arrays(batch_size, seq_len)
        self._fill_arrays(arrays, chunks, token_ids, rope_lengths)
        graph.input_buffer.copy_(pack_pinned(self._model.device, arrays), non_blocking=True)
        if prev_tokens is not None:
            graph.input_ids.copy_(prev_tokens[graph.input_ids])
        return graph.replay()

    def _padding_arrays(self, batch_size: int, seq_len: int) -> InputArrays:
        """Padding token ids, positions, block ids and offsets, rope and context lengths, block tables."""
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
        block_ids[:num_tokens] = [chunk.block_table[chunk.num_computed // block_size] for chunk in chunks]
        for table_row, chunk in zip(block_tables, chunks, strict=False):
            block_table = chunk.block_table[: chunk.num_computed // block_size + 1]
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
    """Make a capture function for the current GPU. Its graphs share one memory pool: a replay overwrites the
    result of the one before."""
    pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    def capture(run_model: Callable[[], Tensor]) -> Callable[[], Tensor]:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            # compiles kernels and opens library handles, which a capture does not allow
            run_model()
            torch.cuda.synchronize()
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                hidden = run_model()
            except BaseException:
                with suppress(RuntimeError):  # report the error that ended the capture
                    graph.capture_end()
                raise
            graph.capture_end()

        def replay() -> Tensor:
            graph.replay()
            return hidden

        return replay

    return capture
