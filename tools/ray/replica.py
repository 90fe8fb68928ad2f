"""One engine of several: it serves the whole API, to calls that come through Ray."""

from __future__ import annotations

import asyncio
import logging
import sys
from typing import TYPE_CHECKING, Any

from ...kernels.common.errors import RunError
from .http_call import Call

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, MutableMapping

    from ...engine.async_engine import AsyncEngine
    from ...engine.server.config import ServerConfig

Message = dict[str, Any]


class Replica:
    """An engine and the application over it. `opening` makes the engine where the replica is."""

    def __init__(self, opening: Callable[[], AsyncEngine], config: ServerConfig) -> None:
        from ...engine.server.app import create_app  # noqa: PLC0415 - of the extra `serve`

        logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
        self._engine = opening()
        self._app = create_app(self._engine, config)

    async def answer(self, call: Call) -> AsyncIterator[Message]:
        """The ASGI messages of the response. Who stops reading has left, as one who closes the connection."""
        messages: asyncio.Queue[Message | None] = asyncio.Queue()
        left = asyncio.Event()
        body = [{"type": "http.request", "body": call.body, "more_body": False}]

        async def receive() -> Message:
            if body:
                return body.pop()
            await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: MutableMapping[str, Any]) -> None:
            messages.put_nowait(dict(message))

        async def respond() -> None:
            try:
                await self._app(call.scope, receive, send)
            finally:
                messages.put_nowait(None)

        responding = asyncio.create_task(respond())
        try:
            while (message := await messages.get()) is not None:
                yield message
        finally:
            left.set()
            await asyncio.wait({responding})
            if not responding.cancelled():
                responding.exception()  # the application has logged it and answered with 500

    async def metrics(self) -> tuple[str, str]:
        """The replica's name, and what it tells Prometheus."""
        from ray import serve  # noqa: PLC0415

        found = [message.get("body", b"") async for message in self.answer(Call.get("/metrics"))]
        return serve.get_replica_context().replica_id.unique_id, b"".join(found).decode()

    def check_health(self) -> None:
        """For Ray, which replaces a replica whose engine is broken. Raises RunError that says why."""
        if self._engine.refusal:
            raise RunError(self._engine.refusal)

    def __del__(self) -> None:
        """Ray calls it when all answers have ended."""
        if hasattr(self, "_engine"):
            self._engine.shutdown()
