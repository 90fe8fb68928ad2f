"""API key checks, also for a mounted application."""

from __future__ import annotations

from fastapi import FastAPI
from trimtab.engine import AsyncEngine
from trimtab.engine.server import ServerConfig, create_app

from .conftest import Client, ClientFactory, parse_error


def test_a_key_is_required_only_under_v1(make_client: ClientFactory) -> None:
    client = make_client(api_key="secret")
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret"}):
        refused = client.get("/v1/models", headers=headers)
        assert parse_error(refused, 401)["code"] == "invalid_api_key"
        assert refused.headers["www-authenticate"] == "Bearer"
    assert client.get("/v1/models", headers={"authorization": "Bearer secret"}).status_code == 200
    assert [client.get(path).status_code for path in ("/", "/health", "/metrics")] == [200] * 3


def test_a_key_is_required_wherever_the_application_is_mounted(tiny_async_engine: AsyncEngine) -> None:
    for root, at in (("/", ""), ("/v", ""), ("", "/llm"), ("", "")):
        outer = FastAPI()
        outer.mount(at, create_app(tiny_async_engine, ServerConfig(api_key="secret")))
        client = Client(outer, root)
        assert client.get(f"{at}/v1/models").status_code == 401
        for written in ("Bearer secret", "bearer  secret "):
            headers = {"authorization": written}
            assert client.get(f"{at}/v1/models", headers=headers).status_code == 200
