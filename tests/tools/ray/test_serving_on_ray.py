"""`trimtab serve --ray`: the tiny model in several processes, behind Ray's proxy.

Each engine step sleeps a fixed time, so that two engines are measurably faster than one on any machine.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray", reason="Ray is not installed")

import httpx2 as httpx
import ray
from ray import serve
from ray.util import list_named_actors
from trimtab import EngineConfig
from trimtab.engine.server import ServerConfig
from trimtab.tools.ray import application
from trimtab.tools.ray.application import Service
from trimtab.tools.ray.config import RayConfig
from trimtab.tools.ray.gateway import LOST_MESSAGE

from .slow_engine import ray_cluster, slow_engine_factory

pytestmark = pytest.mark.long
STEP = 0.1
HEADERS = {"Authorization": "Bearer hush"}
DEFAULT_ROUTER = "ray.serve._private.request_router:PowerOfTwoChoicesRequestRouter"


@dataclass
class RayService:
    """The service's URL, and a function that deploys a number of replicas."""

    url: str
    deploy: Callable[[int], None]

    def chat(self, content: str = "Why?", **more: Any) -> httpx.Response:
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": 6, "temperature": 0, **more}
        return httpx.post(f"{self.url}/v1/chat/completions", json=body, headers=HEADERS, timeout=300)

    def metric(self, name: str) -> dict[str, float]:
        """An unlabelled metric, by replica."""
        lines = httpx.get(f"{self.url}/metrics", timeout=60).text.splitlines()
        matches = [line for line in lines if line.startswith(f'trimtab:{name}{{replica="')]
        return {line.split('"')[1]: float(line.rpartition(" ")[2]) for line in matches}


@pytest.fixture(scope="module")
def ray_service(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayService]:
    pids = tmp_path_factory.mktemp("pids")
    fields = {"kv_cache_memory": "2MiB", "block_size": 16, "max_num_seqs": 4, "served_model_name": "tiny"}
    config = EngineConfig(model=str(tiny_folder), **fields)
    with ray_cluster():
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        serve.start(http_options={"host": "127.0.0.1", "port": port})

        def deploy(replicas: int) -> None:
            service = Service(
                config, ServerConfig(api_key="hush"), RayConfig(ray=True, replicas=str(replicas))
            )
            app = service.build_app(slow_engine_factory(tiny_folder, STEP, pids, **fields))
            serve.run(app, name=application.APP_NAME)
            end = time.monotonic() + 300
            while len(client.metric("engine_steps_total")) != replicas:
                assert time.monotonic() < end
                time.sleep(0.2)

        client = RayService(f"http://127.0.0.1:{port}", deploy)
        deploy(1)
        yield client
        serve.delete(application.APP_NAME)
        serve.shutdown()


def tokens_per_second(ray_service: RayService, calls: int) -> float:
    """Throughput of calls of different lengths, sixteen at a time."""
    lengths = [8 + 7 * index % 17 for index in range(calls)]

    def ask(index: int) -> int:
        answer = ray_service.chat(f"{index}?", max_tokens=lengths[index], ignore_eos=True)
        return int(answer.json()["usage"]["completion_tokens"])

    start = time.monotonic()
    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(ask, range(calls))) == lengths
    return sum(lengths) / (time.monotonic() - start)


def test_two_replicas_have_nearly_twice_the_throughput_of_one(ray_service: RayService) -> None:
    tokens_per_second(ray_service, 16)
    one = tokens_per_second(ray_service, 96)
    ray_service.deploy(2)
    tokens_per_second(ray_service, 16)
    two = tokens_per_second(ray_service, 96)
    print(f"one replica {one:.1f} tokens/s, two {two:.1f}: {two / one:.2f} times as many")
    assert two / one >= 1.8


def test_the_api_key_is_required(ray_service: RayService) -> None:
    assert httpx.get(f"{ray_service.url}/v1/models", timeout=60).status_code == 401
    assert (
        httpx.get(f"{ray_service.url}/v1/models", headers=HEADERS, timeout=60).json()["data"][0]["id"]
        == "tiny"
    )
    assert httpx.get(f"{ray_service.url}/health", timeout=60).json() == {"status": "ok"}


def num_computed_tokens(ray_service: RayService, letters: str) -> float:
    """Prompt tokens computed for calls with few distinct prefixes, two at a time."""
    before = sum(ray_service.metric("prefix_cache_queries_total").values())
    before -= sum(ray_service.metric("prefix_cache_hits_total").values())
    objectives = [f"{letter}. " + "Your answer should be kind and true. " * 4 for letter in letters * 4]

    def ask(index: int) -> None:
        assert ray_service.chat(
            f"What is {index}?", max_tokens=1, steering={"objectives": [objectives[index]]}
        ).is_success

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(ask, range(len(objectives))))
    queries, hits = (ray_service.metric(f"prefix_cache_{name}_total") for name in ("queries", "hits"))
    assert all(queries.values())
    return sum(queries.values()) - sum(hits.values()) - before


def test_prefix_routing_computes_fewer_prompt_tokens_than_rays_default_router(
    ray_service: RayService, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray_service.deploy(2)
    ours = num_computed_tokens(ray_service, "abcdefgh")
    monkeypatch.setattr(application, "ROUTER", DEFAULT_ROUTER)
    ray_service.deploy(2)
    theirs = num_computed_tokens(ray_service, "ijklmnop")
    monkeypatch.undo()
    ray_service.deploy(2)
    print(f"{ours:.0f} tokens computed by prefix, {theirs:.0f} by the power of two choices")
    assert ours < 0.85 * theirs


def test_a_rolling_restart_fails_no_call(ray_service: RayService) -> None:
    done = threading.Event()

    def ask(client: int) -> list[int]:
        statuses = []
        while not done.is_set():
            statuses.append(ray_service.chat(f"{client} {len(statuses)}?").status_code)
        return statuses

    with ThreadPoolExecutor(3) as pool:
        asking = [pool.submit(ask, client) for client in range(3)]
        before = set(ray_service.metric("engine_steps_total"))
        ray_service.deploy(2)
        done.set()
        statuses = [status for each in asking for status in each.result(300)]
    assert not before & set(ray_service.metric("engine_steps_total"))
    print(f"{len(statuses)} calls during a rolling restart")
    assert set(statuses) == {200}


def replicas() -> list[Any]:
    """The actors of the replicas."""
    names = [each["name"] for each in list_named_actors(all_namespaces=True) if "#Replica#" in each["name"]]
    return [ray.get_actor(name, namespace="serve") for name in names]


def last_event(ray_service: RayService, index: int) -> dict[str, Any]:
    """The last event of a stream before [DONE]."""
    answer = ray_service.chat(f"{index}?", max_tokens=100, ignore_eos=True, stream=True)
    *_, last, done, rest = answer.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return json.loads(last.removeprefix("data: "))  # type: ignore[no-any-return]


def test_streams_of_a_killed_replica_end_with_an_error_and_the_service_continues(
    ray_service: RayService,
) -> None:
    ray_service.deploy(2)
    start = time.monotonic()
    with ThreadPoolExecutor(6) as pool:
        streams = [pool.submit(last_event, ray_service, index) for index in range(6)]
        while sum(map(bool, ray_service.metric("num_requests_running").values())) < 2:
            time.sleep(0.1)
        ray.kill(replicas()[0], no_restart=False)
        ends = [stream.result(240) for stream in streams]
    print(f"ends after {time.monotonic() - start:.1f} s: {[end.get('error') for end in ends]}")
    errors = [end["error"]["message"] for end in ends if "error" in end]
    assert errors
    assert set(errors) == {LOST_MESSAGE}
    finished = [end["choices"][0]["finish_reason"] for end in ends if "error" not in end]
    assert finished
    assert set(finished) == {"length"}
    assert ray_service.chat().status_code == 200
