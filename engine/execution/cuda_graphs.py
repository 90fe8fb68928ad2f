"""Decoding steps as CUDA graphs: captured for some sizes when the engine starts, then replayed in one launch.

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

from ...kernels.common.transfer import pack, unpack
from ...kernels.reference.paged_kv_cache import DeviceKV, Layout

if TYPE_CHECKING:
    from ...kernels.attention_metadata import Segment
    from ...models.llama import Llama

Capture = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]
"""Makes of a call another that does the same again with the same tensors."""
Columns = list["np.ndarray[Any, Any]"]

MOST_ROWS, LONGEST = 256, 32_768
"""Beyond so many rows, and tokens of a text, a step is not captured: it would keep memory for all of them."""
SHORTEST, APART = 1024, 4
"""The first length that steps are captured for, and how many times as long the next is."""


def row_sizes(most: int) -> list[int]:
    """Numbers of rows that steps are captured for: 1, 2, 4, 8, 16, then each half as much again or a third.

    Rows that fill a step up read one key each, and its weights are read for all rows at once.
    """
    most = min(most, MOST_ROWS)
    sizes = {1, 2, 4, 8, 16, *(of << power for power in range(3, 8) for of in (3, 4))}
    return sorted({size for size in sizes if size < most} | {most})


def lengths(longest: int) -> list[int]:
    """Longest texts that steps are captured for, each four times the one before.

    A length decides how many programs are launched for a row; those beyond its text end at once.
    """
    longest, found = min(longest, LONGEST), []
    length = SHORTEST
    while length < longest:
        found.append(length)
        length *= APART
    return [*found, longest]


@dataclass(frozen=True)
class _Graph:
    """One size of step: the bytes that all its inputs lie in, and what runs it to its hidden states.

    ids [rows]: the tokens among them. layout: kept since its kernels read it, of which nothing else knows
    once they are captured.
    """

    inputs: Tensor
    ids: Tensor
    layout: Layout
    replay: Callable[[], Tensor]


class DecodeGraphs:
    """All that is captured of one model and cache. `capture` is `captured` on a GPU.

    Raises torch.cuda.OutOfMemoryError, as what is captured keeps its memory.
    """

    def __init__(
        self, model: Llama, cache: DeviceKV, max_rows: int, max_length: int, capture: Capture
    ) -> None:
        self._model, self._cache = model, cache
        self._rows, self._lengths = row_sizes(max_rows), lengths(max_length)
        self._dynamic = model.config.rope.kind == "dynamic"
        # the largest first: its memory serves the others
        sizes = [(rows, length) for rows in reversed(self._rows) for length in reversed(self._lengths)]
        self._graphs = {size: self._captured(*size, capture) for size in sizes}

    @property
    def count(self) -> int:
        """How many sizes there are."""
        return len(self._graphs)

    def run(
        self,
        segments: Sequence[Segment],
        token_ids: Sequence[int],
        turned_by: Sequence[int],
        chosen: Tensor | None = None,
    ) -> Tensor | None:
        """Hidden states of the tokens and of what fills them up, [rows, hidden], until the next run.

        chosen [tokens] on the device: where given, token_ids are places among these.
        None for a step that is not captured: with a prompt in it, or larger than all that are.
        """
        longest = max(segment.start for segment in segments) + 1
        rows = next((size for size in self._rows if size >= len(segments)), 0)
        length = next((size for size in self._lengths if size >= longest), 0)
        if not rows or not length or any(segment.count > 1 for segment in segments):
            return None
        graph = self._graphs[rows, length]
        columns = self._blank(rows, length)
        self._fill(columns, segments, token_ids, turned_by)
        graph.inputs.copy_(pack(self._model.device, columns), non_blocking=True)
        if chosen is not None:
            graph.ids.copy_(chosen[graph.ids])
        return graph.replay()

    def _blank(self, rows: int, length: int) -> Columns:
        """Ids, positions, pages, offsets, what a rope turns by, starts and tables of rows that fill up."""
        columns: Columns = [np.zeros(rows, np.int64) for _ in range(5)]
        columns[2][:] = self._cache.spare
        tables = np.full((rows, -(-length // self._cache.block_size)), self._cache.spare, np.int32)
        return [*columns, np.zeros(rows, np.int32), tables]

    def _fill(
        self,
        columns: Columns,
        segments: Sequence[Segment],
        token_ids: Sequence[int],
        turned_by: Sequence[int],
    ) -> None:
        ids, positions, pages, offsets, turns, starts, tables = columns
        count, block = len(segments), self._cache.block_size
        ids[:count], turns[:count] = token_ids, turned_by
        positions[:count] = starts[:count] = [segment.start for segment in segments]
        offsets[:count] = positions[:count] % block
        pages[:count] = [segment.pages[segment.start // block] for segment in segments]
        for row, segment in zip(tables, segments, strict=False):
            held = segment.pages[: segment.start // block + 1]
            row[: len(held)] = held

    def _captured(self, rows: int, length: int, capture: Capture) -> _Graph:
        columns, model, cache = self._blank(rows, length), self._model, self._cache
        inputs = pack(model.device, columns).to(model.device)
        ids, positions, pages, offsets, turns, starts, tables = unpack(inputs, columns)
        layout = Layout.decoding(pages, offsets, starts, tables, length)
        turned_by = turns if self._dynamic else None

        def step() -> Tensor:
            cache.layout = layout
            return model.forward(ids, positions, cache, turned_by)

        return _Graph(inputs, ids, layout, capture(step))


def captured() -> Capture:
    """Captures on the current GPU; all that one captures shares its memory, so one result holds at a time."""
    pool, side = torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    def capture(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            step()  # kernels are compiled and libraries open their handles here: a capture allows neither
            torch.cuda.synchronize()
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                hidden = step()
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
