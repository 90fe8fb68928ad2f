"""Minimal HTTP client that streams a response line by line, for server benches.

It speaks HTTP/1.1 over asyncio streams, with negligible overhead in the measured times.
"""

from __future__ import annotations

import asyncio
import json
import ssl
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ....kernels.common.errors import InputError, RunError

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Mapping

MAX_LINE_BYTES = 1 << 24


class HTTPStatusError(RunError):
    """The server answered with a `status` other than 200."""

    def __init__(self, status: int, body: str) -> None:
        super().__init__(f"the server answered {status}: {' '.join(body.split())[:200]}")
        self.status = status


@dataclass(frozen=True)
class HTTPClient:
    """Client of one server. Raises InputError for an invalid URL."""

    base_url: str
    api_key: str | None = None

    def __post_init__(self) -> None:
        url = urlsplit(self.base_url)
        try:
            valid = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
        except ValueError:
            valid = False
        if not valid:
            raise InputError(f"base_url is {self.base_url!r}; it must be like http://127.0.0.1:8000")

    async def get_json(self, path: str) -> Any:
        """GET the JSON at `path`."""
        return json.loads(b"\n".join([line async for line in self.stream_lines(path)]))

    async def stream_lines(
        self, path: str, body: Mapping[str, Any] | None = None
    ) -> AsyncGenerator[bytes, None]:
        """Yield the lines of the response, without line ends. With a body the request is a POST.

        Raises HTTPStatusError for a status other than 200, RunError for an incomplete response.
        """
        url = urlsplit(self.base_url)
        tls = ssl.create_default_context() if url.scheme == "https" else None
        port = url.port or (443 if tls else 80)
        writer = None
        try:
            reader, writer = await asyncio.open_connection(url.hostname, port, ssl=tls, limit=MAX_LINE_BYTES)
            writer.write(self._build_request(url.netloc, url.path.rstrip("/") + path, body))
            status, headers = await _read_head(reader)
            chunks = _iter_chunks(reader, headers)
            if status != 200:
                raise HTTPStatusError(
                    status, b"".join([chunk async for chunk in chunks]).decode(errors="replace")
                )
            async for line in _iter_lines(chunks):
                yield line
        except (OSError, EOFError, ValueError) as error:
            raise RunError(
                f"{self.base_url} sent an incomplete answer: {error or type(error).__name__}"
            ) from error
        finally:
            if writer is not None:
                writer.close()

    def _build_request(self, host: str, path: str, body: Mapping[str, Any] | None) -> bytes:
        content = b"" if body is None else json.dumps(body).encode()
        head = [
            f"{'GET' if body is None else 'POST'} {path} HTTP/1.1",
            f"Host: {host.rpartition('@')[2]}",
            "Connection: close",
            *([] if body is None else ["Content-Type: application/json", f"Content-Length: {len(content)}"]),
            *([f"Authorization: Bearer {self.api_key}"] if self.api_key else []),
        ]
        return "\r\n".join([*head, "", ""]).encode() + content


async def _read_head(reader: asyncio.StreamReader) -> tuple[int, dict[bytes, bytes]]:
    """The status and the headers, with names and values in lower case."""
    status_line = (await reader.readline()).split()
    if len(status_line) < 2:
        raise EOFError("it closed the connection")
    headers = {}
    while line := (await reader.readline()).strip():
        name, _, value = line.partition(b":")
        headers[name.lower()] = value.strip().lower()
    return int(status_line[1]), headers


async def _iter_chunks(reader: asyncio.StreamReader, headers: Mapping[bytes, bytes]) -> AsyncIterator[bytes]:
    """Yield the body as it arrives: chunked, with a Content-Length, or until the connection closes."""
    if b"chunked" in headers.get(b"transfer-encoding", b""):
        while size := int((await reader.readline()).partition(b";")[0] or b"broken", 16):
            yield await reader.readexactly(size)
            await reader.readline()
    elif b"content-length" in headers:
        yield await reader.readexactly(int(headers[b"content-length"]))
    else:
        while chunk := await reader.read(1 << 16):
            yield chunk


async def _iter_lines(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Split a byte stream into lines."""
    partial = b""
    async for chunk in chunks:
        *complete, partial = (partial + chunk).split(b"\n")
        for line in complete:
            yield line.rstrip(b"\r")
    if partial:
        yield partial
