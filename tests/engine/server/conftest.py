from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from trimtab.engine import AsyncEngine
from trimtab.engine.server import ServerConfig, create_app

from ...helpers.tiny_model import at_rest
from .server_process import Server, serving

QUESTION = [{"role": "user", "content": "Why?"}]
STEERING = {"objectives": [{"text": "Be kind.", "weight": 2}, "Be brief."]}


@pytest.fixture(scope="session")
def demo_server(demo_folder: Path) -> Iterator[Server]:
    """The demo model, served by a process of its own."""
    with serving("--dtype", "float32", "--max-num-seqs", "12") as server:
        yield server


@pytest.fixture(scope="module")
def one_async_engine(tiny_folder: Path) -> Iterator[AsyncEngine]:
    engine = AsyncEngine.from_pretrained(
        str(tiny_folder), kv_cache_memory="2MiB", max_num_seqs=12, served_model_name="tiny"
    )
    yield engine
    engine.shutdown()


@dataclass
class Client:
    """Calls the application in this process, as a server with this root path does."""

    app: Any
    root: str = ""

    def __call__(self, method: str, path: str, **rest: Any) -> httpx.Response:
        async def call() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False, root_path=self.root)
            async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
                return await client.request(method, path, **rest)

        return asyncio.run(asyncio.wait_for(call(), 60))

    def get(self, path: str, **rest: Any) -> httpx.Response:
        return self("GET", path, **rest)

    def chat(self, **body: Any) -> httpx.Response:
        return self("POST", "/v1/chat/completions", json={"messages": QUESTION, "max_tokens": 6, **body})

    def complete(self, **body: Any) -> httpx.Response:
        return self("POST", "/v1/completions", json={"prompt": "Why", "max_tokens": 6, **body})


MakeClient = Callable[..., Client]


@pytest.fixture
def client_of(one_async_engine: AsyncEngine) -> Iterator[MakeClient]:
    """Makes a client of an application with the given settings; the engine is at rest afterwards."""
    yield lambda **settings: Client(create_app(one_async_engine, ServerConfig(**settings)))
    assert at_rest(one_async_engine)


@pytest.fixture
def client(client_of: MakeClient) -> Client:
    return client_of()


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The chunks of a stream, which ends as it must."""
    assert response.headers["content-type"].startswith("text/event-stream")
    *lines, last, rest = response.text.split("\n\n")
    assert (last, rest) == ("data: [DONE]", "")
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def error(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error of a response, which has OpenAI's shape."""
    assert response.status_code == status, response.text
    body = response.json()
    assert list(body) == ["error"]
    assert list(body["error"]) == ["message", "type", "param", "code"]
    assert "Traceback" not in response.text
    found: dict[str, Any] = body["error"]
    return found
