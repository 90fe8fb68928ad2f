"""What comes from a client: the body of its call, and that it leaves."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from starlette.requests import ClientDisconnect

from ...kernels.common.errors import quoted
from .errors import ApiError, left
from .protocol import read

if TYPE_CHECKING:
    from starlette.requests import Request as HttpRequest
    from starlette.types import Receive

    from .config import ServerConfig


async def body(http: HttpRequest, config: ServerConfig) -> dict[str, Any]:
    """The JSON object of a call's body. Raises ApiError when it is too large, too slow, or none."""
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"Content-Type is {quoted(kind)}; it must be application/json")
    return read(await received(http, config))


async def received(http: HttpRequest, config: ServerConfig) -> bytes:
    """The bytes of a call's body. Raises ApiError when they are too many or too slow."""
    try:
        return await asyncio.wait_for(_bytes(http, config), config.body_timeout)
    except (TimeoutError, asyncio.TimeoutError) as error:
        message = f"the body did not come within {config.body_timeout:g} s"
        raise ApiError(408, message, "timeout_error") from error
    except ClientDisconnect as error:
        raise left() from error


async def gone(receive: Receive) -> None:
    """Returns when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _bytes(http: HttpRequest, config: ServerConfig) -> bytes:
    limit, found = config.max_body_bytes, bytearray()
    async for part in http.stream():
        found += part
        if len(found) > limit:
            raise ApiError(413, f"the body has more than {limit} bytes, the most that this server takes")
    return bytes(found)
