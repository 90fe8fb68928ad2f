"""The gateway with replicas in this process: responses while replicas die, refuse calls or time out."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray", reason="Ray is not installed")

import httpx2 as httpx
from ray.exceptions import ActorDiedError
from ray.serve.exceptions import BackPressureError
from trimtab.engine import AsyncEngine
from trimtab.engine.server import ServerConfig
from trimtab.tools.ray import gateway
from trimtab.tools.ray.gateway import Gateway
from trimtab.tools.ray.replica import Replica

CHAT = {"messages": [{"role": "user", "content": "Why?"}], "max_tokens": 6, "temperature": 0}


@dataclass
class FakeHandle:
    """A real replica in this process, behind the interface of Ray's handle. `deaths`: for each call, the
    number of messages after which the replica dies. `refuses`: exceptions that the next calls raise."""

    replica: Replica
    deaths: list[int] = field(default_factory=list)
    refuses: list[Exception] = field(default_factory=list)
    never_answers: bool = False

    def options(self, stream: bool) -> FakeHandle:
        assert stream
        return self

    @property
    def answer(self) -> FakeHandle:
        return self

    def remote(self, call: Any) -> CancellableStream:
        return CancellableStream(self._messages(call))

    async def _messages(self, call: Any) -> AsyncIterator[dict[str, Any]]:
        if self.refuses:
            raise self.refuses.pop()
        if self.never_answers:
            await asyncio.sleep(60)
        left = self.deaths.pop(0) if self.deaths else -1
        async for message in self.replica.answer(call):
            if left == 0:
                raise ActorDiedError
            left -= 1
            yield message


class CancellableStream:
    """A stream of messages that can be cancelled, like Ray's."""

    def __init__(self, messages: AsyncIterator[dict[str, Any]]) -> None:
        self._messages = messages

    def __aiter__(self) -> CancellableStream:
        return self

    async def __anext__(self) -> dict[str, Any]:
        return await anext(self._messages)

    def cancel(self) -> None:
        self._ending = asyncio.ensure_future(self._messages.aclose())  # type: ignore[attr-defined]


@pytest.fixture(scope="module")
def one_replica(tiny_folder: Path) -> Iterator[Replica]:
    opening = partial(AsyncEngine.from_pretrained, str(tiny_folder), kv_cache_memory="2MiB")
    replica = Replica(opening, ServerConfig())
    yield replica
    replica.__del__()


@pytest.fixture
def handle(one_replica: Replica) -> FakeHandle:
    return FakeHandle(one_replica)


@pytest.fixture
def gateway_request(handle: FakeHandle) -> Callable[..., httpx.Response]:
    """Sends a request to a gateway with the handle."""

    def request(config: ServerConfig, method: str, path: str, **kwargs: Any) -> httpx.Response:
        app = Gateway(handle, config).__serve_build_asgi_app__()  # type: ignore[arg-type]

        async def call() -> httpx.Response:
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
                return await client.request(method, path, **kwargs)

        return asyncio.run(asyncio.wait_for(call(), 60))

    return request


@pytest.fixture
def chat(gateway_request: Callable[..., httpx.Response]) -> Callable[..., httpx.Response]:
    return lambda **more: gateway_request(
        ServerConfig(), "POST", "/v1/chat/completions", json={**CHAT, **more}
    )


def events(response: httpx.Response) -> list[dict[str, Any]]:
    *lines, last, rest = response.text.split("\n\n")
    assert (last, rest) == ("data: [DONE]", "")
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def test_the_gateway_has_the_api_of_a_single_server(
    gateway_request: Callable[..., httpx.Response], chat: Callable[..., httpx.Response]
) -> None:
    config = ServerConfig()
    for path in ("/", "/health", "/version", "/v1/models", "/v1/steer/methods", "/openapi.json"):
        assert gateway_request(config, "GET", path).status_code == 200
    assert gateway_request(config, "GET", "/nope").json()["error"]["message"] == "GET /nope does not exist"
    text = chat().json()["choices"][0]["message"]["content"]
    pieces = events(chat(stream=True))
    assert "".join(each["choices"][0]["delta"].get("content", "") for each in pieces) == text
    assert chat(temperature=-1).json()["error"]["param"] == "temperature"


def test_api_key_and_body_size_are_checked_before_a_replica_is_called(
    gateway_request: Callable[..., httpx.Response], handle: FakeHandle
) -> None:
    handle.refuses.append(AssertionError("a replica was called"))
    config = ServerConfig(api_key="hush", max_body_bytes=10)
    assert gateway_request(config, "POST", "/v1/chat/completions", json=CHAT).status_code == 401
    headers = {"Authorization": "Bearer hush"}
    refused = gateway_request(config, "POST", "/v1/chat/completions", json=CHAT, headers=headers)
    assert (refused.status_code, "more than 10 bytes" in refused.text) == (413, True)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("deaths", [[0], [1], [0, 1]])
def test_another_replica_answers_if_one_dies_before_its_answer_starts(
    chat: Callable[..., httpx.Response], handle: FakeHandle, stream: bool, deaths: list[int]
) -> None:
    alone = chat()
    handle.deaths += deaths
    answer = chat(stream=stream)
    assert answer.status_code == 200
    if not stream:
        assert answer.json()["choices"] == alone.json()["choices"]
    else:
        assert events(answer)[-1]["choices"][0]["finish_reason"] == "length"


def test_a_stream_whose_replica_dies_ends_with_an_error(
    chat: Callable[..., httpx.Response], handle: FakeHandle
) -> None:
    handle.deaths.append(4)
    *chunks, error = events(chat(stream=True))
    assert len(chunks) == 3
    assert error["error"]["message"] == gateway.LOST_MESSAGE


def test_a_call_that_kills_every_replica_fails_after_max_attempts(
    chat: Callable[..., httpx.Response], handle: FakeHandle
) -> None:
    handle.deaths += [0] * 99
    refused = chat()
    assert (refused.status_code, refused.json()["error"]["message"]) == (503, gateway.LOST_MESSAGE)
    assert len(handle.deaths) == 99 - gateway.MAX_ATTEMPTS


def test_a_full_queue_answers_429_with_retry_after(
    chat: Callable[..., httpx.Response], handle: FakeHandle
) -> None:
    handle.refuses.append(BackPressureError(num_queued_requests=9, max_queued_requests=9))
    refused = chat()
    assert (refused.status_code, refused.headers["Retry-After"]) == (429, "1")


def test_waiting_for_a_replica_times_out(
    gateway_request: Callable[..., httpx.Response], handle: FakeHandle, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle.never_answers = True
    monkeypatch.setattr(gateway, "SHORT_TIMEOUT", 0.05)
    monkeypatch.setattr(gateway, "CLIENT_READ_TIMEOUT", 0.05)
    config = ServerConfig(request_timeout=0.05)
    for method, path in (("GET", "/health"), ("POST", "/v1/chat/completions")):
        refused = gateway_request(config, method, path)
        assert (refused.status_code, "no replica answered within" in refused.text) == (503, True)


def test_a_disconnecting_client_aborts_its_request(one_replica: Replica) -> None:
    from trimtab.tools.ray.http_call import HTTPCall  # noqa: PLC0415

    body = json.dumps({**CHAT, "max_tokens": 400, "ignore_eos": True, "stream": True}).encode()
    scope = {**HTTPCall.get("/v1/chat/completions").scope, "method": "POST"}
    scope["headers"] = [(b"content-type", b"application/json")]

    async def leaving() -> None:
        messages = one_replica.answer(replace(HTTPCall.from_scope(scope, body)))
        for _ in range(4):
            await anext(messages)
        await messages.aclose()  # type: ignore[attr-defined]

    asyncio.run(leaving())
    engine = one_replica._engine
    tokens = engine.stats.steps
    asyncio.run(asyncio.sleep(0.1))
    assert (engine.unfinished, engine.stats.steps - tokens < 5) == (0, True)
    one_replica.check_health()


def test_metrics_are_labelled_by_replica() -> None:
    from trimtab.tools.ray.metrics import merge_metrics  # noqa: PLC0415

    text = '# HELP a_total what a is\n# TYPE a_total counter\na_total 3.0\n# TYPE g gauge\ng{k="v"} 1.0\n'
    merged = merge_metrics([("x", text), ("y", text)]).decode().splitlines()
    assert merged.count("# HELP a_total what a is") == 1
    assert {'a_total{replica="x"} 3.0', 'a_total{replica="y"} 3.0', 'g{k="v",replica="y"} 1.0'} <= set(merged)
