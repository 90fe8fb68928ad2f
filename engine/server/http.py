"""Listen on an address, read request bodies, and detect client disconnects."""

from __future__ import annotations

import asyncio
import socket
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
    """Read the body as a JSON object. Raises ApiError if it is too large, too slow or not JSON."""
    content_type = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/json":
        raise ApiError(415, f"Content-Type is {short_repr(content_type)}; it must be application/json")
    return parse_json(await read_body(http, config))


async def read_body(http: HttpRequest, config: ServerConfig) -> bytes:
    """Read the body as bytes. Raises ApiError if it is too large or too slow."""
    try:
        return await asyncio.wait_for(_read_limited(http, config), config.body_timeout)
    except (TimeoutError, asyncio.TimeoutError) as error:
        message = f"the request body did not arrive within {config.body_timeout:g} s"
        raise ApiError(408, message, "timeout_error") from error
    except ClientDisconnect as error:
        raise client_disconnected() from error


async def wait_disconnect(receive: Receive) -> None:
    """Wait until the client disconnects."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def _read_limited(http: HttpRequest, config: ServerConfig) -> bytes:
    limit, data = config.max_body_bytes, bytearray()
    async for chunk in http.stream():
        data += chunk
        if len(data) > limit:
            raise ApiError(413, f"the request body is larger than the limit of {limit} bytes")
    return bytes(data)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; `::` listens on all interfaces, with IPv4 too where the system can."""
    if ":" not in host:
        return socket.create_server((host, port))
    dualstack = host == "::" and socket.has_dualstack_ipv6()
    return socket.create_server((host, port), family=socket.AF_INET6, dualstack_ipv6=dualstack)


def base_url(host: str, port: int) -> str:
    """The URL of a server at this address, with brackets around an IPv6 address."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
