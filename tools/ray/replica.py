"""Replica deployment: one engine with the HTTP API, called through Ray."""

from __future__ import annotations

import asyncio
import logging
import sys
from typing import TYPE_CHECKING, Any

from ...kernels.common.errors import RunError
from .http_call import HTTPCall

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, MutableMapping

    from ...engine.async_engine import AsyncEngine
    from ...engine.server.config import ServerConfig

Message = dict[str, Any]


class Replica:
    """An engine and its ASGI application. `engine_factory` creates the engine in the replica's process."""

    def __init__(self, engine_factory: Callable[[], AsyncEngine], config: ServerConfig) -> None:
        from ...engine.server.app import create_app  # noqa: PLC0415 - needs the extra `serve`

        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
        self._engine = engine_factory()
        self._app = create_app(self._engine, config)

    async def answer(self, call: HTTPCall) -> AsyncIterator[Message]:
        """Yield the ASGI messages of the response. Closing the generator counts as a client disconnect."""
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        disconnected = asyncio.Event()
        body_messages = [{"type": "http.request", "body": call.body, "more_body": False}]

        async def receive() -> Message:
            if body_messages:
                return body_messages.pop()
            await disconnected.wait()
            return {"type": "http.disconnect"}

        async def send(message: MutableMapping[str, Any]) -> None:
            messages.put_nowait(dict(message))

        async def run_app() -> None:
            try:
                await self._app(call.scope, receive, send)
            finally:
                messages.put_nowait(None)

        app_task = asyncio.create_task(run_app())
        try:
            while (message := await messages.get()) is not None:
                yield message
        finally:
            disconnected.set()
            await asyncio.wait({app_task})
            if not app_task.cancelled():
                app_task.exception()  # marks it as retrieved; the application has logged it

    async def metrics(self) -> tuple[str, str]:
        """The replica's name and its Prometheus metrics."""
        from ray import serve  # noqa: PLC0415

        chunks = [message.get("body", b"") async for message in self.answer(HTTPCall.get("/metrics"))]
        return serve.get_replica_context().replica_id.unique_id, b"".join(chunks).decode()

    def check_health(self) -> None:
        """Raises RunError, with the reason, if the engine is broken; Ray then replaces the replica."""
        if self._engine.refusal:
            raise RunError(self._engine.refusal)

    def __del__(self) -> None:
        """Ray calls this when all calls have finished."""
        if hasattr(self, "_engine"):
            self._engine.shutdown()
