"""What clients talk to: it reads a call, has a replica answer it, and tells the client if that one dies."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from ray.exceptions import RayActorError, RayError
from ray.serve.exceptions import BackPressureError, RayServeException
from starlette.requests import Request
from starlette.responses import Response

from ...engine.server.app import KeyGuard
from ...engine.server.errors import SERVER, ApiError, api_error
from ...engine.server.http import received
from ...engine.server.serving import PATIENCE
from ...engine.server.sse import event
from ...kernels.common.errors import BusyError
from .http_call import Call
from .metrics import merged

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from ray.serve.handle import DeploymentHandle
    from starlette.types import ASGIApp, Receive, Scope, Send

    from ...engine.server.config import ServerConfig

TRIES = 3
"""Replicas that a call is given to, should they die before they answer."""
QUICK = 15.0
"""Seconds that a call may take which decodes nothing."""
FULL = "too many requests are waiting for a replica; try again later"
LOST = "the replica that was answering is gone; ask again"


class Gateway:
    """The deployment that clients reach. It holds no model."""

    def __init__(self, replicas: DeploymentHandle, config: ServerConfig) -> None:
        self._forward, self._key = Forward(replicas, config), config.api_key

    def __serve_build_asgi_app__(self) -> ASGIApp:
        return self._forward if self._key is None else KeyGuard(self._forward, self._key)


class Forward:
    """An ASGI application whose every answer is a replica's."""

    def __init__(self, replicas: DeploymentHandle, config: ServerConfig) -> None:
        self._replicas, self._config = replicas, config

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        try:
            if scope["path"] == "/metrics":
                response = await self._metrics()
            else:
                body = await received(Request(scope, receive), self._config)
                return await self._pass_on(Call.of(scope, body), send)
        except ApiError as error:
            response = error.response
        await response(scope, receive, send)

    async def _pass_on(self, call: Call, send: Send) -> None:
        """Sends what a replica answers. The head waits for the first piece of the body: until then another
        replica may answer instead."""
        for _ in range(TRIES):
            head: dict[str, Any] | None = None
            begun = False
            try:
                async with aclosing(self._answer(call)) as messages:
                    async for message in messages:
                        if message["type"] == "http.response.start":
                            head = message
                            continue
                        if head is not None and not begun:
                            begun = True
                            await send(head)
                        await send(message)
                return
            except RayActorError:
                if begun:
                    return await _break_off(head, send)
            except BackPressureError as error:
                raise api_error(BusyError(FULL)) from error
            except (RayError, RayServeException) as error:
                if begun:
                    return await _break_off(head, send)
                raise ApiError(503, LOST, SERVER) from error
        raise ApiError(503, LOST, SERVER)

    async def _answer(self, call: Call) -> AsyncGenerator[dict[str, Any], None]:
        """The messages of one replica, which is told when nobody reads on. Raises ApiError if late."""
        answers = call.scope["method"] == "POST"
        seconds = self._config.request_timeout + PATIENCE if answers else QUICK
        messages = self._replicas.options(stream=True).answer.remote(call)
        try:
            while True:
                try:
                    yield await asyncio.wait_for(anext(messages), seconds)
                except StopAsyncIteration:
                    return
                except (TimeoutError, asyncio.TimeoutError) as error:
                    message = f"no replica answered within {seconds:g} s"
                    raise ApiError(503, message, SERVER) from error
        finally:
            messages.cancel()

    async def _metrics(self) -> Response:
        found = await self._replicas.broadcast("metrics").results_async(timeout_s=QUICK)
        return Response(merged(found), media_type="text/plain; version=0.0.4; charset=utf-8")


async def _break_off(head: dict[str, Any] | None, send: Send) -> None:
    """Ends an answer that nobody will finish: a stream of events with an event that says so."""
    kind = dict(head["headers"]).get(b"content-type", b"") if head else b""
    if not kind.startswith(b"text/event-stream"):
        raise RuntimeError(LOST)  # the connection is closed before the length that was promised
    await event(send, ApiError(503, LOST, SERVER).body)
    await event(send, "[DONE]", more=False)
