"""A small HTTP client that reads an answer line by line, as it comes: what a bench of a server needs of one.

It speaks HTTP/1.1 over asyncio's streams and adds next to nothing to the times that are measured.
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

LONGEST_LINE = 1 << 24


class RefusedError(RunError):
    """The server answered with a status that is not 200. `status` is it."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"the server answered {status}: {' '.join(text.split())[:200]}")
        self.status = status


@dataclass(frozen=True)
class Client:
    """Calls one server. Raises InputError for a URL that is none."""

    base_url: str
    key: str | None = None

    def __post_init__(self) -> None:
        url = urlsplit(self.base_url)
        try:
            ok = url.scheme in ("http", "https") and bool(url.hostname) and url.port != 0
        except ValueError:
            ok = False
        if not ok:
            raise InputError(f"base_url is {self.base_url!r}; it must be like http://127.0.0.1:8000")

    async def get(self, path: str) -> Any:
        """The JSON at this path."""
        return json.loads(b"\n".join([line async for line in self.lines(path)]))

    async def lines(self, path: str, body: Mapping[str, Any] | None = None) -> AsyncGenerator[bytes, None]:
        """The lines of an answer, without their ends; a body makes it a POST.

        Raises RefusedError for a status that is not 200, RunError where no whole answer comes.
        """
        url = urlsplit(self.base_url)
        tls = ssl.create_default_context() if url.scheme == "https" else None
        port = url.port or (443 if tls else 80)
        writer = None
        try:
            reader, writer = await asyncio.open_connection(url.hostname, port, ssl=tls, limit=LONGEST_LINE)
            writer.write(self._asked(url.netloc, url.path.rstrip("/") + path, body))
            status, headers = await _head(reader)
            pieces = _pieces(reader, headers)
            if status != 200:
                raise RefusedError(
                    status, b"".join([piece async for piece in pieces]).decode(errors="replace")
                )
            async for line in _lines(pieces):
                yield line
        except (OSError, EOFError, ValueError) as error:
            raise RunError(
                f"{self.base_url} gave no whole answer: {error or type(error).__name__}"
            ) from error
        finally:
            if writer is not None:
                writer.close()

    def _asked(self, host: str, path: str, body: Mapping[str, Any] | None) -> bytes:
        content = b"" if body is None else json.dumps(body).encode()
        head = [
            f"{'GET' if body is None else 'POST'} {path} HTTP/1.1",
            f"Host: {host.rpartition('@')[2]}",
            "Connection: close",
            *([] if body is None else ["Content-Type: application/json", f"Content-Length: {len(content)}"]),
            *([f"Authorization: Bearer {self.key}"] if self.key else []),
        ]
        return "\r\n".join([*head, "", ""]).encode() + content


async def _head(reader: asyncio.StreamReader) -> tuple[int, dict[bytes, bytes]]:
    """The status and the headers, their names in small letters."""
    words = (await reader.readline()).split()
    if len(words) < 2:
        raise EOFError("it closed the connection")
    headers = {}
    while line := (await reader.readline()).strip():
        name, _, value = line.partition(b":")
        headers[name.lower()] = value.strip().lower()
    return int(words[1]), headers


async def _pieces(reader: asyncio.StreamReader, headers: Mapping[bytes, bytes]) -> AsyncIterator[bytes]:
    """The content as it comes: in chunks, of a given length, or until the end."""
    if b"chunked" in headers.get(b"transfer-encoding", b""):
        while size := int((await reader.readline()).partition(b";")[0] or b"broken", 16):
            yield await reader.readexactly(size)
            await reader.readline()
    elif b"content-length" in headers:
        yield await reader.readexactly(int(headers[b"content-length"]))
    else:
        while piece := await reader.read(1 << 16):
            yield piece


async def _lines(pieces: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Pieces cut anew, at the ends of lines."""
    rest = b""
    async for piece in pieces:
        *whole, rest = (rest + piece).split(b"\n")
        for line in whole:
            yield line.rstrip(b"\r")
    if rest:
        yield rest
