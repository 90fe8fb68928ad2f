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

from ...helpers.tiny_model import is_idle
from .server_process import ServerProcess, run_server

QUESTION = [{"role": "user", "content": "Why?"}]
STEERING = {"objectives": [{"text": "Be kind.", "weight": 2}, "Be brief."]}


@pytest.fixture(scope="session")
def demo_server(demo_folder: Path) -> Iterator[ServerProcess]:
    """The demo model, served by a separate process."""
    with run_server("--dtype", "float32", "--max-num-seqs", "12") as server:
        yield server


@pytest.fixture(scope="module")
def tiny_async_engine(tiny_folder: Path) -> Iterator[AsyncEngine]:
    engine = AsyncEngine.from_pretrained(
        str(tiny_folder), kv_cache_memory="2MiB", max_num_seqs=12, served_model_name="tiny"
    )
    yield engine
    engine.shutdown()


@dataclass
class Client:
    """Calls the application in this process through ASGI, with this root path."""

    app: Any
    root_path: str = ""

    def __call__(self, method: str, path: str, **kwargs: Any) -> httpx.Response:
        async def send() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False, root_path=self.root_path)
            async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
                return await client.request(method, path, **kwargs)

        return asyncio.run(asyncio.wait_for(send(), 60))

    def get(self, path: str, **kwargs: Any) -> httpx.Response:
        return self("GET", path, **kwargs)

    def chat(self, **body: Any) -> httpx.Response:
        return self("POST", "/v1/chat/completions", json={"messages": QUESTION, "max_tokens": 6, **body})

    def complete(self, **body: Any) -> httpx.Response:
        return self("POST", "/v1/completions", json={"prompt": "Why", "max_tokens": 6, **body})


ClientFactory = Callable[..., Client]


@pytest.fixture
def make_client(tiny_async_engine: AsyncEngine) -> Iterator[ClientFactory]:
    """A factory of clients with the given server settings; checks that the engine is idle afterwards."""
    yield lambda **settings: Client(create_app(tiny_async_engine, ServerConfig(**settings)))
    assert is_idle(tiny_async_engine)


@pytest.fixture
def client(make_client: ClientFactory) -> Client:
    return make_client()


def parse_sse(response: httpx.Response) -> list[dict[str, Any]]:
    """The chunks of an event stream; checks that it ends with [DONE]."""
    assert response.headers["content-type"].startswith("text/event-stream")
    *lines, last, tail = response.text.split("\n\n")
    assert (last, tail) == ("data: [DONE]", "")
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def parse_error(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error of a response; checks its status and the OpenAI format."""
    assert response.status_code == status, response.text
    body = response.json()
    assert list(body) == ["error"]
    assert list(body["error"]) == ["message", "type", "param", "code"]
    assert "Traceback" not in response.text
    detail: dict[str, Any] = body["error"]
    return detail
