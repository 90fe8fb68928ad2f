"""Gateway deployment: forwards HTTP calls to replicas, and handles replicas that die."""

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
"""Replicas that are tried if they die before their answer starts."""
SHORT_TIMEOUT = 15.0
"""Timeout in seconds of a call that decodes nothing."""
BUSY_MESSAGE = "too many requests are waiting for a replica; try again later"
LOST_MESSAGE = "the replica that was answering has died; try again"


class Gateway:
    """The deployment that clients connect to. It has no model."""

    def __init__(self, replicas: DeploymentHandle, config: ServerConfig) -> None:
        self._app, self._key = ForwardingApp(replicas, config), config.api_key

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return self._app if self._key is None else APIKeyMiddleware(self._app, self._key)


class ForwardingApp:
    """An ASGI application that forwards each call to a replica."""

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
        """Send a replica's response. The head is delayed until the first chunk of the body: until then
        another replica can answer instead."""
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
        """Yield the messages of one replica; closing the generator cancels the call.

        Raises ApiError on a timeout.
        """
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
    """End the response of a dead replica: an event stream with an error event, any other by raising."""
    content_type = dict(start_message["headers"]).get(b"content-type", b"") if start_message else b""
    if not content_type.startswith(b"text/event-stream"):
        raise RuntimeError(LOST_MESSAGE)  # closes the connection before Content-Length is reached
    await send_event(send, ApiError(503, LOST_MESSAGE, SERVER_ERROR).body)
    await send_event(send, "[DONE]", more_body=False)
