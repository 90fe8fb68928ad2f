"""What clients talk to: it reads a call, has a replica answer it, and tells the client if that one dies."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from starlette.requests import Request
from starlette.responses import Response

from ...engine.server.app import APIKeyMiddleware
from ...engine.server.errors import SERVER_ERROR, ApiError, to_api_error
from ...engine.server.http import read_body
from ...engine.server.serving import CLIENT_READ_TIMEOUT
from ...engine.server.sse import send_event
from ...kernels.common.errors import BusyError
from .http_call import HTTPCall
from .metrics import merge_metrics

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from ray.serve.handle import DeploymentHandle
    from starlette.types import ASGIApp, Receive, Scope, Send

    from ...engine.server.config import ServerConfig

MAX_ATTEMPTS = 3
"""Replicas that a call is given to, should they die before they answer."""
SHORT_TIMEOUT = 15.0
"""Seconds that a call may take which decodes nothing."""
BUSY_MESSAGE = "too many requests are waiting for a replica; try again later"
LOST_MESSAGE = "the replica that was answering is gone; ask again"


class Gateway:
    """The deployment that clients reach. It holds no model."""

    def __init__(self, replicas: DeploymentHandle, config: ServerConfig) -> None:
        self._app, self._key = ForwardingApp(replicas, config), config.api_key

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return self._app if self._key is None else APIKeyMiddleware(self._app, self._key)


class ForwardingApp:
    """An ASGI application whose every answer is a replica's."""

    def __init__(self, replicas: DeploymentHandle, config: ServerConfig) -> None:
        self._replicas, self._config = replicas, config

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        try:
            if scope["path"] == "/metrics":
                response = await self._merged_metrics()
            else:
                body = await read_body(Request(scope, receive), self._config)
                return await self._proxy(HTTPCall.from_scope(scope, body), send)
        except ApiError as error:
            response = error.response
        await response(scope, receive, send)

    async def _proxy(self, call: HTTPCall, send: Send) -> None:
        """Sends what a replica answers. The head waits for the first piece of the body: until then another
        replica may answer instead."""
        for _ in range(MAX_ATTEMPTS):
            start_message: dict[str, Any] | None = None
            started = False
            try:
                async with aclosing(self._stream_replica(call)) as messages:
                    async for message in messages:
                        if message["type"] == "http.response.start":
                            start_message = message
                            continue
                        if start_message is not None and not started:
                            started = True
                            await send(start_message)
                        await send(message)
                return
            except RayActorError:
                if started:
                    return await _abort_stream(start_message, send)
            except BackPressureError as error:
                raise to_api_error(BusyError(BUSY_MESSAGE)) from error
            except (RayError, RayServeException) as error:
                if started:
                    return await _abort_stream(start_message, send)
                raise ApiError(503, LOST_MESSAGE, SERVER_ERROR) from error
        raise ApiError(503, LOST_MESSAGE, SERVER_ERROR)

    async def _stream_replica(self, call: HTTPCall) -> AsyncGenerator[dict[str, Any], None]:
        """The messages of one replica, which is told when nobody reads on. Raises ApiError if late."""
        generates = call.scope["method"] == "POST"
        timeout = self._config.request_timeout + CLIENT_READ_TIMEOUT if generates else SHORT_TIMEOUT
        messages = self._replicas.options(stream=True).answer.remote(call)
        try:
            while True:
                try:
                    yield await asyncio.wait_for(anext(messages), timeout)
                except StopAsyncIteration:
                    return
                except (TimeoutError, asyncio.TimeoutError) as error:
                    message = f"no replica answered within {timeout:g} s"
                    raise ApiError(503, message, SERVER_ERROR) from error
        finally:
            messages.cancel()

    async def _merged_metrics(self) -> Response:
        texts = await self._replicas.broadcast("metrics").results_async(timeout_s=SHORT_TIMEOUT)
        return Response(merge_metrics(texts), media_type="text/plain; version=0.0.4; charset=utf-8")


async def _abort_stream(start_message: dict[str, Any] | None, send: Send) -> None:
    """Ends an answer that nobody will finish: a stream of events with an event that says so."""
    content_type = dict(start_message["headers"]).get(b"content-type", b"") if start_message else b""
    if not content_type.startswith(b"text/event-stream"):
        raise RuntimeError(LOST_MESSAGE)  # the connection is closed before the length that was promised
    await send_event(send, ApiError(503, LOST_MESSAGE, SERVER_ERROR).body)
    await send_event(send, "[DONE]", more_body=False)
