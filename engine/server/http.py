"""Read a call's body, and notice that its client disconnects."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from starlette.requests import ClientDisconnect

from ...kernels.common.errors import short_repr
from .errors import ApiError, client_disconnected
from .protocol import parse_json

if TYPE_CHECKING:
    from starlette.requests import Request as HttpRequest
    from starlette.types import Receive

    from .config import ServerConfig


async def read_json_body(http: HttpRequest, config: ServerConfig) -> dict[str, Any]:
    """The JSON object of a call's body. Raises ApiError when it is too large, too slow, or none."""
    content_type = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise ApiError(415, f"Content-Type is {short_repr(content_type)}; it must be application/json")
    return parse_json(await read_body(http, config))


async def read_body(http: HttpRequest, config: ServerConfig) -> bytes:
    """The bytes of a call's body. Raises ApiError when they are too many or too slow."""
    try:
        return await asyncio.wait_for(_read_limited(http, config), config.body_timeout)
    except (TimeoutError, asyncio.TimeoutError) as error:
        message = f"the body did not come within {config.body_timeout:g} s"
        raise ApiError(408, message, "timeout_error") from error
    except ClientDisconnect as error:
        raise client_disconnected() from error


async def wait_disconnect(receive: Receive) -> None:
    """Returns when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _read_limited(http: HttpRequest, config: ServerConfig) -> bytes:
    limit, data = config.max_body_bytes, bytearray()
    async for chunk in http.stream():
        data += chunk
        if len(data) > limit:
            raise ApiError(413, f"the body has more than {limit} bytes, the most that this server takes")
    return bytes(data)
