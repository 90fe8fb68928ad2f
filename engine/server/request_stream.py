"""Merge the output streams of one HTTP call."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from .errors import SERVER_ERROR, ApiError, bad_request, to_api_error

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from ..core.request_handle import OutputStream
    from ..outputs import Delta, Output
    from ..sampling_params import SamplingParams
    from .request_log import RequestLog
    from .requests import ParsedCall
    from .responses import ResponseBuilder


class ActiveCall:
    """One call under way: its streams, one for each prompt, and the record of it."""

    def __init__(
        self, parsed: ParsedCall, streams: list[OutputStream], log: RequestLog, builder: ResponseBuilder
    ) -> None:
        self.parsed, self.log, self.builder = parsed, log, builder
        self._streams = streams

    async def iter_deltas(self) -> AsyncIterator[tuple[int, Delta]]:
        """The pieces of all answers as they come, each with its choice's index. Raises ApiError."""
        queue: asyncio.Queue[tuple[int, Delta | Exception]] = asyncio.Queue()

        async def forward(first_index: int, stream: OutputStream) -> None:
            try:
                async for delta in stream:
                    queue.put_nowait((first_index + delta.index, delta))
            except Exception as error:  # told to whoever waits for the pieces
                queue.put_nowait((first_index, error))

        n = self.parsed.requests[0].sampling.n
        tasks = [asyncio.create_task(forward(n * i, stream)) for i, stream in enumerate(self._streams)]
        try:
            num_open = self.parsed.num_choices
            while num_open:
                index, item = await queue.get()
                if isinstance(item, Exception):
                    raise to_api_error(item)
                self.log.on_delta(index, item)
                num_open -= item.output is not None
                yield index, item
                if item.output is not None:
                    _check_finished(item.output, self.parsed.requests[0].sampling, self._streams[index // n])
        finally:
            for task in tasks:
                task.cancel()
            self.close()

    def close(self) -> None:
        """Aborts what is left."""
        for stream in self._streams:
            stream.close()


def _check_finished(output: Output, sampling: SamplingParams, stream: OutputStream) -> None:
    """Raises ApiError for an answer that did not come to an end of its own."""
    if output.error is None:
        return
    if output.finish_reason == "abort" and stream.expired:
        raise ApiError(504, output.error, "timeout_error")
    if output.finish_reason == "abort":
        raise ApiError(503, output.error, SERVER_ERROR)
    if sampling.logit_bias or sampling.min_tokens:  # they may leave no token to choose
        raise bad_request(output.error, None)
    raise ApiError(500, output.error, SERVER_ERROR)
