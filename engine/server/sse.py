"""Stream responses as server-sent events (SSE)."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from starlette.responses import Response

from ..utils.json import COMPACT, dumps
from .errors import ApiError, client_disconnected, shutting_down
from .http import wait_disconnect

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.types import Receive, Scope, Send

    from .request_stream import ActiveCall


class EventSourceResponse(Response):
    """Streams the deltas of a call as server-sent events."""

    media_type = "text/event-stream"

    def __init__(self, call: ActiveCall, timeout: float) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._call, self._timeout = call, timeout

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        tasks: set[asyncio.Task[Any]] = set()
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            send_task, disconnect_task = (
                asyncio.create_task(self._send_chunks(send)),
                asyncio.create_task(wait_disconnect(receive)),
            )
            tasks = {send_task, disconnect_task}
            await asyncio.wait(tasks, timeout=self._timeout, return_when=asyncio.FIRST_COMPLETED)
            self._call.log.finish(send_task.result() if send_task.done() else client_disconnected())
        except (OSError, RuntimeError):  # the connection is closed
            self._call.log.finish(client_disconnected())
        except asyncio.CancelledError:
            for task in tasks:
                task.cancel()
            self._call.log.finish(shutting_down())
            await send_event(send, shutting_down().body)
            await send_event(send, "[DONE]", more_body=False)
        finally:
            for task in tasks:
                task.cancel()
            self._call.close()

    async def _send_chunks(self, send: Send) -> ApiError | None:
        """Send all chunks and [DONE]. Returns the error that ended the stream early, or None."""
        failure = None
        try:
            async for chunk in self._checked_chunks():
                await send_event(send, chunk)
        except ApiError as error:
            failure = error
            await send_event(send, failure.body)
        await send_event(send, "[DONE]", more_body=False)
        return failure

    async def _checked_chunks(self) -> AsyncIterator[dict[str, Any]]:
        """Yield the chunks; convert every exception to ApiError."""
        try:
            async for chunk in self._build_chunks():
                yield chunk
        except Exception as error:
            raise self._call.log.convert_error(error) from error

    async def _build_chunks(self) -> AsyncIterator[dict[str, Any]]:
        call, builder = self._call, self._call.builder
        include_usage = call.parsed.include_usage
        started: set[int] = set()
        async for index, delta in call.iter_deltas():
            chunks = [] if index in started else [builder.first_chunk(index)]
            started.add(index)
            chunks.append(builder.delta_chunk(index, delta))
            if delta.output is not None and delta.output.error is None:
                chunks.append(builder.final_chunk(index, delta.output))
            for chunk in chunks:
                if chunk is not None:
                    yield {**chunk, "usage": None} if include_usage else chunk
        if include_usage:
            yield builder.usage_chunk(call.log.prompts, call.log.num_tokens)


async def send_event(send: Send, data: dict[str, Any] | str, more_body: bool = True) -> None:
    """Send one server-sent event. `more_body` is False for the last one."""
    text = data if isinstance(data, str) else dumps(data, COMPACT)
    await send({"type": "http.response.body", "body": f"data: {text}\n\n".encode(), "more_body": more_body})
