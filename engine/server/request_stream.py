"""A call under way: its answers as they come, from all of its requests."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from .errors import SERVER, ApiError, api_error, bad

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from ..core.request_handle import Stream
    from ..outputs import Delta, Output
    from ..sampling_params import SamplingParams
    from .request_log import Record
    from .requests import Asked
    from .responses import Answers


class Served:
    """One call under way: its streams, one for each prompt, and the record of it."""

    def __init__(self, asked: Asked, streams: list[Stream], record: Record, answers: Answers) -> None:
        self.asked, self.record, self.answers = asked, record, answers
        self._streams = streams

    async def pieces(self) -> AsyncIterator[tuple[int, Delta]]:
        """The pieces of all answers as they come, each with its choice's index. Raises ApiError."""
        arrived: asyncio.Queue[tuple[int, Delta | Exception]] = asyncio.Queue()

        async def follow(first: int, stream: Stream) -> None:
            try:
                async for delta in stream:
                    arrived.put_nowait((first + delta.index, delta))
            except Exception as error:  # told to whoever waits for the pieces
                arrived.put_nowait((first, error))

        n = self.asked.requests[0].sampling.n
        tasks = [asyncio.create_task(follow(n * at, stream)) for at, stream in enumerate(self._streams)]
        try:
            left = self.asked.answers
            while left:
                index, news = await arrived.get()
                if isinstance(news, Exception):
                    raise api_error(news)
                self.record.saw(index, news)
                left -= news.output is not None
                yield index, news
                if news.output is not None:
                    _require_end(news.output, self.asked.requests[0].sampling, self._streams[index // n])
        finally:
            for task in tasks:
                task.cancel()
            self.close()

    def close(self) -> None:
        """Aborts what is left."""
        for stream in self._streams:
            stream.close()


def _require_end(output: Output, sampling: SamplingParams, stream: Stream) -> None:
    """Raises ApiError for an answer that did not come to an end of its own."""
    if output.error is None:
        return
    if output.finish_reason == "abort" and stream.expired:
        raise ApiError(504, output.error, "timeout_error")
    if output.finish_reason == "abort":
        raise ApiError(503, output.error, SERVER)
    if sampling.logit_bias or sampling.min_tokens:  # they may leave no token to choose
        raise bad(output.error, None)
    raise ApiError(500, output.error, SERVER)
