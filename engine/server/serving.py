"""A generating call from its body to its last byte: whole, or as server-sent events.

Whoever leaves before the end takes the request along: it is aborted within a step.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from typing import TYPE_CHECKING, Any

from starlette.responses import Response

from ...kernels.common.errors import InputError
from ..utils.json import dumps
from .errors import left
from .http import body, gone
from .request_log import Record
from .request_stream import Served
from .responses import Answers
from .sse import EventStream

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.requests import Request as HttpRequest

    from ..async_engine import AsyncEngine
    from ..core.request_handle import Stream
    from .config import ServerConfig
    from .metrics import Metrics
    from .requests import Asked

PATIENCE = 30.0
"""Seconds after the end of an answer in which a client must have read it."""


class Serving:
    """Serves the generating calls of one engine."""

    def __init__(
        self,
        engine: AsyncEngine,
        config: ServerConfig,
        model: str,
        metrics: Metrics,
        text_of: Callable[[int], str],
    ) -> None:
        self._engine, self._config, self._model = engine, config, model
        self._metrics, self._text_of = metrics, text_of

    async def serve(self, http: HttpRequest, ask: Callable[[dict[str, Any]], Asked]) -> Response:
        """The response to a call; `ask` makes of its body what is asked."""
        kind = "chatcmpl" if "/chat/" in http.url.path else "cmpl"
        client = http.client.host if http.client else ""
        record = Record(
            f"{kind}-{uuid.uuid4().hex}", http.url.path, client, self._metrics, self._config.log_prompts
        )
        try:
            values = await body(http, self._config)
            asked = await asyncio.to_thread(ask, values)
            record.asked(asked, values)
            served = await self._begin(asked, record)
        except (Exception, asyncio.CancelledError) as error:
            return _refused(record, error)
        if asked.stream:
            return EventStream(served, self._config.request_timeout + PATIENCE)
        try:
            return await _unless_gone(http, _whole(served), record)
        except (Exception, asyncio.CancelledError) as error:
            return _refused(record, error)
        finally:
            served.close()

    async def _begin(self, asked: Asked, record: Record) -> Served:
        streams: list[Stream] = []
        try:
            for request in asked.requests:
                streams.append(await self._engine.begin(request, self._config.request_timeout))
        except BaseException as error:
            for stream in streams:
                stream.close()
            if isinstance(error, InputError) and error.field in ("", "branch_token_ids"):
                error.field = "messages" if asked.chat else "prompt"
            raise
        answers = Answers(record.id, int(time.time()), self._model, asked.chat, self._text_of)
        return Served(asked, streams, record, answers)


async def _whole(served: Served) -> Response:
    async for _ in served.pieces():
        pass
    outputs = [served.record.outputs[index] for index in range(served.asked.answers)]
    found = served.answers.whole(outputs, served.record.prompts)
    response = Response(dumps(found), media_type="application/json")
    served.record.end()
    return response


async def _unless_gone(http: HttpRequest, work: Any, record: Record) -> Response:
    """What the work gives; it is cancelled as soon as the client is gone."""
    working, leaving = asyncio.create_task(work), asyncio.create_task(gone(http.receive))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            response: Response = working.result()
            return response
        record.end(left())
        return left().response
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


def _refused(record: Record, error: BaseException) -> Response:
    failure = record.failure(error)
    record.end(failure)
    return failure.response
