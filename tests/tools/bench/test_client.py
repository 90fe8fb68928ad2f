"""HTTP client of the benches, against servers that send given bytes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
from trimtab.kernels.common.errors import InputError, RunError
from trimtab.tools.bench.http.client import HTTPClient, HTTPStatusError
from trimtab.tools.bench.http.stream import CHAT_ENDPOINT, StreamResult, stream_request

HEAD = b"HTTP/1.1 200 OK\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: Chunked\r\n\r\n"


@asynccontextmanager
async def serve_pieces(*pieces: bytes) -> AsyncIterator[tuple[HTTPClient, list[bytes]]]:
    """A server that reads a request's head, writes `pieces` with a pause between them, and closes."""
    heads: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads.append(await reader.readuntil(b"\r\n\r\n"))
        for piece in pieces:
            writer.write(piece)
            await asyncio.sleep(0.01)
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        yield HTTPClient(f"http://127.0.0.1:{port}/below/", "hush"), heads


def read_lines(*pieces: bytes) -> tuple[list[bytes], bytes]:
    async def call() -> tuple[list[bytes], bytes]:
        async with serve_pieces(*pieces) as (client, heads):
            return [line async for line in client.stream_lines("/x", {"a": 1})], heads[0]

    return asyncio.run(asyncio.wait_for(call(), 10))


@pytest.mark.parametrize(
    "pieces",
    [
        (CHUNKED, b"4\r\nab\nc\r\n3;x=y\r\nd\ne\r\n", b"0\r\n\r\n"),
        (HEAD + b"content-length: 7\r\n\r\nab\ncd\ne",),
        (HEAD + b"\r\n", b"ab\r", b"\ncd\ne"),
    ],
)
def test_lines_do_not_depend_on_how_the_body_is_split(pieces: tuple[bytes, ...]) -> None:
    assert read_lines(*pieces)[0] == [b"ab", b"cd", b"e"]


def test_a_request_has_its_host_and_api_key() -> None:
    head = read_lines(HEAD + b"\r\n")[1].decode()
    assert head.startswith("POST /below/x HTTP/1.1\r\nHost: 127.0.0.1:")
    assert "Authorization: Bearer hush\r\n" in head
    assert "Content-Length: 8\r\n" in head


def test_an_error_status_is_reported() -> None:
    with pytest.raises(HTTPStatusError, match="the server answered 429: too many") as caught:
        read_lines(b"HTTP/1.1 429 No\r\nContent-Length: 9\r\n\r\ntoo many\n")
    assert caught.value.status == 429


@pytest.mark.parametrize(
    "pieces", [(), (CHUNKED, b"4\r\na"), (CHUNKED,), (HEAD + b"content-length: 9\r\n\r\nab",), (b"what\r\n",)]
)
def test_an_incomplete_response_is_a_run_error(pieces: tuple[bytes, ...]) -> None:
    with pytest.raises(RunError, match="sent an incomplete answer"):
        read_lines(*pieces)


@pytest.mark.parametrize("url", ["", "here", "http://", "ftp://x", "http://x:port", "http://x:0"])
def test_an_invalid_url_is_refused(url: str) -> None:
    with pytest.raises(InputError, match="base_url is "):
        HTTPClient(url)


def stream_answer(*lines: bytes) -> StreamResult:
    async def call() -> StreamResult:
        async with serve_pieces(HEAD + b"\r\n", *lines) as (client, _):
            return await stream_request(client, CHAT_ENDPOINT, {}, steered=False)

    return asyncio.run(asyncio.wait_for(call(), 10))


def test_ttft_and_itl_count_only_chunks_with_text() -> None:
    answer = stream_answer(
        b'data: {"choices": [{"delta": {"role": "assistant", "content": ""}}]}\n\n',
        b'data: {"choices": [{"delta": {"content": "a"}}]}\n\n: a comment\n\n',
        b'data: {"choices": [{"delta": {"content": "b"}}]}\n\n',
        b'data: {"choices": [{"delta": {"reasoning_content": "c"}}]}\n\n',
        b'data: {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 5}}\n\ndata: [DONE]\n\n',
    )
    assert answer.error is None
    assert (answer.prompt_tokens, answer.tokens, len(answer.gaps)) == (7, 5, 2)
    assert 0.01 <= answer.ttft < answer.latency
    assert answer.tpot == pytest.approx((answer.latency - answer.ttft) / 4)
    assert sum(answer.gaps) <= answer.latency - answer.ttft


def test_without_usage_every_chunk_counts_as_a_token() -> None:
    piece = b'data: {"choices": [{"text": "a"}]}\n\n'
    assert stream_answer(piece, piece, b"data: [DONE]\n").tokens == 2


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (b'data: {"choices": []}\n', "the stream ended without [DONE]"),
        (b'data: {"error": {"message": "no room"}}\n', "no room"),
        (b"data: {\n", "invalid stream event"),
        (b'data: {"usage": {"tokens": 1}}\n', "invalid stream event"),
    ],
)
def test_a_failed_stream_has_an_error(line: bytes, sentence: str) -> None:
    assert sentence in (stream_answer(line).error or "")
