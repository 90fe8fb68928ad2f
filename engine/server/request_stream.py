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
    """A running call: one output stream for each prompt, its log and its response builder."""

    def __init__(
        self, parsed: ParsedCall, streams: list[OutputStream], log: RequestLog, builder: ResponseBuilder
    ) -> None:
        self.parsed, self.log, self.builder = parsed, log, builder
        self._streams = streams

    async def iter_deltas(self) -> AsyncIterator[tuple[int, Delta]]:
        """Yield (choice index, delta) of all answers as they arrive. Raises ApiError if one fails."""
        queue: asyncio.Queue[tuple[int, Delta | Exception]] = asyncio.Queue()

        async def forward(first_index: int, stream: OutputStream) -> None:
            try:
                async for delta in stream:
                    queue.put_nowait((first_index + delta.index, delta))
            except Exception as error:  # re-raised by the consumer of the queue
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
        """Abort the answers that are not finished."""
        for stream in self._streams:
            stream.close()


def _check_finished(output: Output, sampling: SamplingParams, stream: OutputStream) -> None:
    """Raise ApiError for an answer that was aborted or failed."""
    if output.error is None:
        return
    if output.finish_reason == "abort" and stream.expired:
        raise ApiError(504, output.error, "timeout_error")
    if output.finish_reason == "abort":
        raise ApiError(503, output.error, SERVER_ERROR)
    if sampling.logit_bias or sampling.min_tokens:  # they may leave no token to sample
        raise bad_request(output.error, None)
    raise ApiError(500, output.error, SERVER_ERROR)
