"""Failures as clients see them: the error is reported, and the server continues."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx2 as httpx
import pytest
import uvicorn
from trimtab.engine import AsyncEngine
from trimtab.engine.server import ServerConfig, create_app, serving
from trimtab.models.tokenizer.huggingface import HFTokenizerBackend

from ...harness import get_runner
from ...helpers.polling import wait_until
from ...helpers.tiny_model import is_idle
from .conftest import QUESTION, Client, parse_sse


@pytest.mark.parametrize("error", [ZeroDivisionError, RuntimeError, OSError])
def test_an_internal_error_during_a_stream_is_sent_and_counted(
    client: Client, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    """The token texts of a trace are looked up for the response, after the engine has finished."""
    token_bytes, left = HFTokenizerBackend.token_bytes, iter(range(5))

    def fail(backend: HFTokenizerBackend, token_id: int) -> bytes | None:
        if next(left, None) is None:
            raise error("by design")
        return token_bytes(backend, token_id)

    body = {"steering": {"objectives": ["Be kind."], "trace": True}, "max_tokens": 20, "ignore_eos": True}
    with monkeypatch.context() as patch:
        patch.setattr(HFTokenizerBackend, "token_bytes", fail)
        *pieces, last = parse_sse(client.chat(**body, stream=True))
    assert pieces
    assert last["error"]["message"] == "internal server error; see the server log"
    assert 'trimtab:request_refused_total{status="500"} 1.0' in client.get("/metrics").text
    assert client.chat(**body).status_code == 200


def test_health_reports_why_requests_fail_until_they_succeed(
    client: Client, tiny_async_engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lost(*arguments: Any) -> Any:
        raise OSError("the device is lost")

    with monkeypatch.context() as patch:
        patch.setattr(get_runner(tiny_async_engine).model, "forward", lost)
        assert client.chat().status_code == 503
        for _ in range(2):
            sick = client.get("/health")
            assert sick.status_code == 503
            assert "OSError: the device is lost" in sick.json()["error"]["message"]
    assert client.get("/health").status_code == 200
    assert client.chat().status_code == 200


@contextmanager
def listen(app: Any) -> Iterator[tuple[str, int]]:
    """Serve the application on a real socket with a small send buffer."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        server = uvicorn.Server(uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        try:
            yield listener.getsockname()
        finally:
            server.should_exit = True
            thread.join()


def test_a_client_that_reads_nothing_blocks_no_others_and_is_dropped_after_a_timeout(
    tiny_async_engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The client requests more than the socket buffers hold, and neither reads nor disconnects."""
    monkeypatch.setattr(serving, "CLIENT_READ_TIMEOUT", 1.0)
    app = create_app(tiny_async_engine, ServerConfig(request_timeout=2.0))
    request_body = {"messages": QUESTION, "ignore_eos": True, "temperature": 0}
    much = {**request_body, "stream": True, "max_tokens": 100, "n": 2, "logprobs": True, "top_logprobs": 20}
    body = json.dumps(much).encode()
    with listen(app) as (host, port), socket.socket() as stuck:
        stuck.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stuck.connect((host, port))
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
        stuck.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        wait_until(lambda: tiny_async_engine.stats.running > 0)
        url = f"http://{host}:{port}"
        others = [
            httpx.post(f"{url}/v1/chat/completions", json={**request_body, "max_tokens": 4}, timeout=60)
            for _ in range(3)
        ]
        assert [other.status_code for other in others] == [200] * 3
        texts = {other.json()["choices"][0]["message"]["content"] for other in others}
        assert len(texts) == 1
        wait_until(lambda: is_idle(tiny_async_engine) and not tiny_async_engine.unfinished)
        wait_until(lambda: 'status="499"} 1.0' in httpx.get(f"{url}/metrics", timeout=60).text)
        stuck.settimeout(60)
        rest = b"".join(iter(lambda: stuck.recv(1 << 16), b""))
        assert rest.startswith(b"HTTP/1.1 200")
        assert not rest.endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n"), (
            "a truncated stream must not look complete"
        )
