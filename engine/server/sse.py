"""An answer as server-sent events, while it is decoded."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from starlette.responses import Response

from ..utils.json import COMPACT, dumps
from .errors import ApiError, left, stopped
from .http import gone

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.types import Receive, Scope, Send

    from .request_stream import Served


class EventStream(Response):
    """The pieces of a call as server-sent events."""

    media_type = "text/event-stream"

    def __init__(self, served: Served, timeout: float) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._served, self._timeout = served, timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        tasks: set[asyncio.Task[Any]] = set()
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            sending, leaving = asyncio.create_task(self._send(send)), asyncio.create_task(gone(receive))
            tasks = {sending, leaving}
            await asyncio.wait(tasks, timeout=self._timeout, return_when=asyncio.FIRST_COMPLETED)
            self._served.record.end(sending.result() if sending.done() else left())
        except (OSError, RuntimeError):  # the connection is closed
            self._served.record.end(left())
        except asyncio.CancelledError:
            for task in tasks:
                task.cancel()
            self._served.record.end(stopped())
            await event(send, stopped().body)
            await event(send, "[DONE]", more=False)
        finally:
            for task in tasks:
                task.cancel()
            self._served.close()

    async def _send(self, send: Send) -> ApiError | None:
        """Sends all chunks. Returns the error that ended them before their time."""
        failure = None
        try:
            async for chunk in self._chunks():
                await event(send, chunk)
        except ApiError as error:
            failure = error
            await event(send, failure.body)
        await event(send, "[DONE]", more=False)
        return failure

    async def _chunks(self) -> AsyncIterator[dict[str, Any]]:
        """Raises ApiError, whatever fails."""
        try:
            async for chunk in self._all_chunks():
                yield chunk
        except Exception as error:
            raise self._served.record.failure(error) from error

    async def _all_chunks(self) -> AsyncIterator[dict[str, Any]]:
        served, answers = self._served, self._served.answers
        with_usage = served.asked.include_usage
        opened: set[int] = set()
        async for index, delta in served.pieces():
            found = [] if index in opened else [answers.opening(index)]
            opened.add(index)
            found.append(answers.piece(index, delta))
            if delta.output is not None and delta.output.error is None:
                found.append(answers.closing(index, delta.output.finish_reason))
            for chunk in found:
                if chunk is not None:
                    yield {**chunk, "usage": None} if with_usage else chunk
        if with_usage:
            yield answers.usage(served.record.prompts, served.record.tokens)


async def event(send: Send, data: dict[str, Any] | str, more: bool = True) -> None:
    """Sends a server-sent event; after the last there is no more."""
    text = data if isinstance(data, str) else dumps(data, COMPACT)
    await send({"type": "http.response.body", "body": f"data: {text}\n\n".encode(), "more_body": more})
