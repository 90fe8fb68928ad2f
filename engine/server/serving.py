"""Handle a generating call, from its body to the full or streamed response.

When the client disconnects, its requests are aborted within one step.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from typing import TYPE_CHECKING, Any

from starlette.responses import Response

from ...kernels.common.errors import InputError
from ..utils.json import dumps
from .errors import client_disconnected
from .http import read_json_body, wait_disconnect
from .request_log import RequestLog
from .request_stream import ActiveCall
from .responses import ResponseBuilder
from .sse import EventSourceResponse

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.requests import Request as HttpRequest

    from ..async_engine import AsyncEngine
    from ..core.request_handle import OutputStream
    from .config import ServerConfig
    from .metrics import Metrics
    from .requests import ParsedCall

CLIENT_READ_TIMEOUT = 30.0
"""Seconds that a client has to read the rest of a stream after the request timeout."""


class CallHandler:
    """Handles the generating calls of one engine."""

    def __init__(
        self,
        engine: AsyncEngine,
        config: ServerConfig,
        model: str,
        metrics: Metrics,
        token_bytes: Callable[[int], bytes],
    ) -> None:
        self._engine, self._config, self._model = engine, config, model
        self._metrics, self._token_bytes = metrics, token_bytes

    async def serve(self, http: HttpRequest, parse: Callable[[dict[str, Any]], ParsedCall]) -> Response:
        """The response to a call. `parse` converts its JSON body to a ParsedCall."""
        id_prefix = "chatcmpl" if "/chat/" in http.url.path else "cmpl"
        client = http.client.host if http.client else ""
        log = RequestLog(
            f"{id_prefix}-{uuid.uuid4().hex}", http.url.path, client, self._metrics, self._config.log_prompts
        )
        try:
            values = await read_json_body(http, self._config)
            parsed = await asyncio.to_thread(parse, values)
            log.on_parsed(parsed, values)
            call = await self._start_call(parsed, log)
        except (Exception, asyncio.CancelledError) as error:
            return _error_response(log, error)
        if parsed.stream:
            return EventSourceResponse(call, self._config.request_timeout + CLIENT_READ_TIMEOUT)
        try:
            return await _cancel_on_disconnect(http, _full_response(call), log)
        except (Exception, asyncio.CancelledError) as error:
            return _error_response(log, error)
        finally:
            call.close()

    async def _start_call(self, parsed: ParsedCall, log: RequestLog) -> ActiveCall:
        streams: list[OutputStream] = []
        try:
            for request in parsed.requests:
                streams.append(await self._engine.open_stream(request, self._config.request_timeout))
        except BaseException as error:
            for stream in streams:
                stream.close()
            if isinstance(error, InputError) and error.field in ("", "branch_token_ids"):
                error.field = "messages" if parsed.chat else "prompt"
            raise
        builder = ResponseBuilder(log.id, int(time.time()), self._model, parsed.chat, self._token_bytes)
        return ActiveCall(parsed, streams, log, builder)


async def _full_response(call: ActiveCall) -> Response:
    async for _ in call.iter_deltas():
        pass
    outputs = [call.log.outputs[index] for index in range(call.parsed.num_choices)]
    payload = call.builder.full_response(outputs, call.log.prompts)
    response = Response(dumps(payload), media_type="application/json")
    call.log.finish()
    return response


async def _cancel_on_disconnect(http: HttpRequest, coroutine: Any, log: RequestLog) -> Response:
    """Await `coroutine`, and cancel it as soon as the client disconnects."""
    work_task, disconnect_task = (
        asyncio.create_task(coroutine),
        asyncio.create_task(wait_disconnect(http.receive)),
    )
    try:
        await asyncio.wait({work_task, disconnect_task}, return_when=asyncio.FIRST_COMPLETED)
        if work_task.done():
            response: Response = work_task.result()
            return response
        log.finish(client_disconnected())
        return client_disconnected().response
    finally:
        for task in (work_task, disconnect_task):
            task.cancel()
        await asyncio.gather(work_task, disconnect_task, return_exceptions=True)


def _error_response(log: RequestLog, error: BaseException) -> Response:
    failure = log.convert_error(error)
    log.finish(failure)
    return failure.response
