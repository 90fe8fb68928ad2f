"""The application in this process, on the tiny model: manners, limits, shapes."""

from __future__ import annotations

import asyncio
import gc
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.requests import Request as HttpRequest
from trimtab.engine import (
    Amulet,
    AsyncEngine,
    Guidance,
    Mato,
    Objective,
    Request,
    SamplingParams,
)
from trimtab.engine.methods import METHODS
from trimtab.engine.server import ServerConfig, create_app
from trimtab.engine.server.bodies import NEUTRAL, SAMPLING
from trimtab.engine.server.steering import Profiles
from trimtab.kernels.errors import InputError

from ...waiting import soon
from .conftest import QUESTION, Client, events

KIND = {"text": "Be kind.", "weight": 2}
STEERING = {"objectives": [KIND, "Be brief."]}
MakeClient = Callable[..., Client]


def error(response: Any, status: int) -> dict[str, Any]:
    """The error of a response, which has OpenAI's shape."""
    assert response.status_code == status, response.text
    body = response.json()
    assert list(body) == ["error"]
    assert list(body["error"]) == ["message", "type", "param", "code"]
    assert "Traceback" not in response.text
    found: dict[str, Any] = body["error"]
    return found


def test_it_says_what_it_is(client: Client) -> None:
    assert client.get("/health").json() == {"status": "ok"}
    assert "version" in client.get("/version").json()
    assert client.get("/v1/models").json()["data"][0]["max_model_len"] == 512
    assert client.get("/v1/models/tiny").json()["id"] == "tiny"
    assert error(client.get("/v1/models/other"), 404)["code"] == "model_not_found"
    methods = client.get("/v1/steer/methods").json()["methods"]
    assert [method["name"] for method in methods] == [cls.name for cls in METHODS]
    assert client.get("/docs").status_code == 200
    described = client.get("/openapi.json").json()
    assert "/v1/chat/completions" in described["paths"]


def test_the_page_is_served_and_loads_nothing_from_elsewhere(client: Client) -> None:
    for path, kind in (("/", "text/html"), ("/page.css", "text/css"), ("/page.js", "text/javascript")):
        response = client.get(path)
        assert response.status_code == 200
        assert response.headers["content-type"].startswith(kind)
        assert "default-src 'none'" in response.headers["content-security-policy"]
        assert "https://" not in response.text.replace("http://www.w3.org", "")


def test_an_answer_is_that_of_the_engine(client: Client, one_async_engine: AsyncEngine) -> None:
    method = Mato([Objective("Be kind.", 2), Objective("Be brief.")], kl_budget=0.3)
    sampling = SamplingParams(max_tokens=20, temperature=0.8, seed=3, top_k=50, ignore_eos=True)
    expected = one_async_engine.submit(Request(QUESTION, method, sampling)).result()
    asked = {
        "max_tokens": 20,
        "temperature": 0.8,
        "seed": 3,
        "top_k": 50,
        "ignore_eos": True,
        "steering": {**STEERING, "kl_budget": 0.3, "trace": True},
    }
    found = client.chat(**asked).json()
    choice = found["choices"][0]
    assert choice["message"]["content"] == expected.text
    assert expected.trace is not None
    for name in ("weights", "rewards", "strength", "kl", "branch_logprobs"):
        assert choice["trace"][name] == getattr(expected.trace, name)
    lengths = [len(branch.prompt_token_ids) for branch in expected.branches]
    assert found["usage"] == {
        "prompt_tokens": lengths[0],
        "completion_tokens": 20,
        "total_tokens": lengths[0] + 20,
        "prompt_tokens_details": {"branches": lengths[1:]},
    }
    chunks = events(client.chat(**asked, stream=True))
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == expected.text
    assert not any("usage" in chunk for chunk in chunks)


def test_a_preset_is_asked_for_by_name_and_refused_by_it(
    client: Client, one_async_engine: AsyncEngine
) -> None:
    method = Mato.preset("balanced", [Objective("Be kind.", 2), Objective("Be brief.")], tau=3.0)
    expected = one_async_engine.submit(Request(QUESTION, method, SamplingParams(max_tokens=6))).result()
    asked = {"max_tokens": 6, "temperature": 0}
    found = client.chat(**asked, steering={**STEERING, "preset": "balanced", "tau": 3}).json()
    assert found["choices"][0]["message"]["content"] == expected.text
    refused = client.chat(**asked, steering={**STEERING, "preset": "bold"})
    assert refused.status_code == 400
    assert refused.json()["error"]["message"] == "mato has no preset 'bold'; presets are balanced"
    assert refused.json()["error"]["param"] == "steering.preset"
    (mato,) = (each for each in client.get("/v1/steer/methods").json()["methods"] if each["name"] == "mato")
    assert mato["presets"] == Mato.presets


def test_a_negative_prompt_is_guidance_away_from_it(client: Client, one_async_engine: AsyncEngine) -> None:
    plain, rude = one_async_engine.render(Request(QUESTION, Guidance([Objective("Be rude.")])))
    request = Request(
        branch_token_ids=[rude.prompt_token_ids, plain.prompt_token_ids],
        steering=Guidance([Objective("any")], guidance_scale=1.8),
        sampling=SamplingParams(max_tokens=6),
    )
    expected = one_async_engine.submit(request).result()
    found = client.chat(temperature=0, guidance_scale=1.8, negative_prompt="Be rude.").json()
    assert found["choices"][0]["message"]["content"] == expected.text
    assert error(client.chat(guidance_scale=1.8), 400)["param"] == "guidance_scale"
    assert client.chat(guidance_scale=1).status_code == 200


def test_a_completion_puts_the_wish_before_the_text(client: Client, one_async_engine: AsyncEngine) -> None:
    encode = one_async_engine.tokenizer.encode
    request = Request(
        branch_token_ids=[encode("Why", True), encode("Be kind.\n\nWhy", True)],
        steering=Amulet([Objective("Be kind.")]),
        sampling=SamplingParams(max_tokens=6),
    )
    expected = one_async_engine.submit(request).result()
    steering = {"method": "amulet", "objectives": ["Be kind."]}
    assert client.complete(temperature=0, steering=steering).json()["choices"][0]["text"] == expected.text
    assert error(client.complete(prompt=[5, 6], steering=steering), 400)["param"] == "prompt"


def test_the_preview_shows_the_branches(client: Client, one_async_engine: AsyncEngine) -> None:
    body = {"messages": QUESTION, "steering": STEERING}
    found = client("POST", "/v1/steer/preview", json=body).json()
    prompts = one_async_engine.render(
        Request(QUESTION, Mato([Objective("Be kind.", 2), Objective("Be brief.")]))
    )
    assert found["branches"] == [
        {"name": each.name, "prompt": each.prompt, "tokens": len(each.prompt_token_ids)} for each in prompts
    ]
    assert (found["method"], found["weights"]) == ("mato", [2 / 3, 1 / 3])
    doubtful = {**body, "steering": {"method": "amulet", **STEERING}}
    assert "uneven weights" in client("POST", "/v1/steer/preview", json=doubtful).json()["notes"][0]


@pytest.mark.parametrize("name", NEUTRAL)
def test_what_asks_for_nothing_is_taken_and_all_else_of_it_refused(client: Client, name: str) -> None:
    for value in (None, *NEUTRAL[name]):
        assert client.chat(**{name: value}).status_code == 200
    for value in ({"type": "json_object"}, 1, "required", ["audio"]):
        refused = error(client.chat(**{name: value}), 400)
        assert refused["param"] == name
        assert "not supported" in refused["message"]


def test_what_clients_send_along_is_taken(client: Client) -> None:
    response = client.chat(
        user="u", metadata={"a": "b"}, presence_penalty=0, frequency_penalty=0.0, n=1, logit_bias={}, top_p=1,
        stop=None, seed=None, stream=False, stream_options=None, model="tiny", logprobs=False, top_k=-1,
    )  # fmt: skip
    assert response.status_code == 200
    assert client.chat(logit_bias={"5": 1e30}, temperature=0).json()["usage"]["completion_tokens"] == 6


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({"temprature": 1}, "temprature", "did you mean temperature?"),
        ({"temperature": "hot"}, "temperature", "it must be a number"),
        ({"temperature": -1}, "temperature", "-1"),
        ({"max_tokens": 0}, "max_tokens", "≥ 1"),
        ({"n": 1000}, "n", "from 1 to 128"),
        ({"top_p": 2}, "top_p", "at most 1"),
        ({"stop": ["a", 5]}, "stop", "item 1 of stop is 5"),
        ({"logit_bias": {"x": 1}}, "logit_bias", "token ids"),
        ({"logit_bias": {"99999": 1}}, "logit_bias", "99999"),
        ({"logit_bias": dict.fromkeys(range(1001), 1)}, "logit_bias", "1001 entries"),
        ({"stop": ["a"] * 65}, "stop", "takes 64"),
        ({"top_logprobs": 2}, "top_logprobs", "unless logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "0 to 20"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "unless stream"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options", "'x'"),
        ({"stream": "yes"}, "stream", "true or false"),
        ({"messages": []}, "messages", "empty"),
        ({"messages": "hi"}, "messages", "hi"),
        ({"messages": [{"role": "user"}]}, "messages", "empty"),
        ({"messages": [{"content": "x"}]}, "messages", "role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages",
            "only parts of",
        ),
        ({"steering": 5}, "steering", "an object"),
        ({"steering": "kind"}, "steering", "profiles are none"),
        ({"steering": {"method": "x"}}, "steering.method", "methods are base"),
        ({"steering": {"method": "mato"}}, "steering", "at least one objective"),
        ({"steering": {**STEERING, "tau": 0}}, "steering.tau", "above 0"),
        ({"steering": {**STEERING, "tua": 1}}, "steering.tua", "no setting"),
        ({"steering": {**STEERING, "trace": 1}}, "steering.trace", "true or false"),
        ({"steering": {"objectives": [{"text": "a", "weight": -3}]}}, "steering.objectives[0]", "-3"),
        ({"steering": {"objectives": ["a", {"txt": "b"}]}}, "steering.objectives[1]", "a text"),
        ({"steering": {"objectives": "a"}}, "steering.objectives", "a list"),
        ({"steering": {"objectives": ["a", "a"]}}, "steering", "twice"),
        ({"steering": STEERING, "negative_prompt": "x"}, "negative_prompt", "left out"),
    ],
)
def test_wrong_values_are_named(client: Client, body: dict[str, Any], param: str | None, says: str) -> None:
    response = client("POST", "/v1/chat/completions", json={"messages": QUESTION, "max_tokens": 2, **body})
    found = error(response, 400)
    assert found["param"] == param
    assert says in found["message"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": ["a", 5]}, "prompt"),
        ({"prompt": [[1], []]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [[1]] * 1025}, "prompt"),
        ({"prompt": ["a"] * 9, "n": 128}, "prompt"),
        ({"echo": True}, "echo"),
        ({"best_of": 3}, "best_of"),
        ({"suffix": "x"}, "suffix"),
        ({"messages": QUESTION}, "messages"),
    ],
)
def test_wrong_completions_are_named(client: Client, body: dict[str, Any], param: str) -> None:
    assert error(client.complete(**body), 400)["param"] == param


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"[1]", b'"x"', b"\xff\xfe", b'{"n": NaN}', b"[" * 100_000, b'{"n": ' + b"9" * 6000 + b"}"],
)
def test_what_is_no_json_is_refused(client: Client, raw: bytes) -> None:
    kind = {"content-type": "application/json"}
    error(client("POST", "/v1/chat/completions", content=raw, headers=kind), 400)


def test_half_a_character_is_refused(client: Client) -> None:
    raw = b'{"messages": [{"role": "user", "content": "\\ud800"}]}'
    kind = {"content-type": "application/json"}
    refused = client("POST", "/v1/chat/completions", content=raw, headers=kind)
    assert "lone surrogate" in error(refused, 400)["message"]


def test_a_body_has_a_type_and_a_size(client_of: MakeClient) -> None:
    client = client_of(max_body_bytes=1000)
    assert client.chat().status_code == 200
    assert "1000 bytes" in error(client.chat(user="x" * 1000), 413)["message"]
    kind = {"content-type": "text/plain"}
    error(client("POST", "/v1/chat/completions", content=b"{}", headers=kind), 415)


def test_other_paths_and_verbs_are_refused_alike(client: Client) -> None:
    assert error(client.get("/v2"), 404)["message"] == "there is no GET /v2"
    error(client.get("/v1/chat/completions"), 405)


def test_a_key_is_asked_for_under_v1_alone(client_of: MakeClient) -> None:
    client = client_of(api_key="secret")
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "secret"}):
        refused = client.get("/v1/models", headers=headers)
        assert error(refused, 401)["code"] == "invalid_api_key"
        assert refused.headers["www-authenticate"] == "Bearer"
    assert client.get("/v1/models", headers={"authorization": "Bearer secret"}).status_code == 200
    assert [client.get(path).status_code for path in ("/", "/health", "/metrics")] == [200] * 3


def test_the_page_comes_with_a_policy_that_lets_in_nothing_but_its_own_files(client: Client) -> None:
    for path in ("/", "/page.js", "/page.css"):
        headers = client.get(path).headers
        policy = dict(each.strip().split(" ", 1) for each in headers["content-security-policy"].split(";"))
        assert policy == {
            "default-src": "'none'",
            **dict.fromkeys(("script-src", "style-src", "connect-src"), "'self'"),
            "img-src": "data:",
            **dict.fromkeys(("base-uri", "form-action", "frame-ancestors", "trusted-types"), "'none'"),
            "require-trusted-types-for": "'script'",
        }
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
    page, script = client.get("/").text, client.get("/page.js").text
    assert not re.search(r"\son\w+=|\sstyle=|<style|javascript:|<script(?! type=.module. src)", page)
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|Function\(", script
    )


def test_mounted_in_another_service_it_is_guarded_all_the_same(one_async_engine: AsyncEngine) -> None:
    outer = FastAPI()
    outer.mount("/llm", create_app(one_async_engine, ServerConfig(api_key="secret")))
    client = Client(outer)
    assert client.get("/llm/v1/models").status_code == 401
    headers = {"authorization": "Bearer secret"}
    assert client.get("/llm/v1/models", headers=headers).status_code == 200
    page = client.get("/llm/")
    assert page.status_code == 200
    assert '="/' not in page.text, "the page finds its parts beside it"


def test_profiles_are_steerings_by_name(client_of: MakeClient, tmp_path: Path) -> None:
    file = tmp_path / "profiles.toml"
    file.write_text(
        '[kind]\nmethod = "mato"\nkl_budget = 0.2\n'
        'objectives = [{text = "Be kind.", weight = 2}, "Be brief."]\n'
    )
    client = client_of(profiles=str(file))
    named = client.chat(temperature=0, steering="kind").json()
    written = client.chat(temperature=0, steering={**STEERING, "kl_budget": 0.2}).json()
    assert named["choices"] == written["choices"]
    assert list(client.get("/v1/steer/profiles").json()["profiles"]) == ["kind"]
    assert "profiles are kind" in error(client.chat(steering="other"), 400)["message"]
    file.write_text('[kind]\nobjectives = ["a"]\ntau = -1\n')
    with pytest.raises(InputError, match=r"profile 'kind' .* tau of mato is -1"):
        Profiles.from_file(file)
    with pytest.raises(InputError, match="cannot be read"):
        Profiles.from_file(tmp_path / "none.toml")


def test_an_answer_that_takes_too_long_is_ended(client_of: MakeClient) -> None:
    client = client_of(request_timeout=0.2)
    body = {"max_tokens": 400, "ignore_eos": True, "logit_bias": {"5": 50}, "n": 4}
    assert "timeout of 0.2 s" in error(client.chat(**body), 504)["message"]
    *_, last = events(client.chat(**body, stream=True))
    assert last["error"]["type"] == "timeout_error"


@pytest.mark.parametrize("timeout", [300, 0.2])
def test_whether_a_deadline_or_the_engines_end_cut_an_answer_off_is_told_by_the_status(
    tiny_folder: Path, timeout: float
) -> None:
    engine = AsyncEngine.from_pretrained(str(tiny_folder), kv_cache_memory="2MiB")
    client = Client(create_app(engine, ServerConfig(request_timeout=timeout)))
    late = threading.Timer(1, engine.shutdown)
    late.start()
    refused = client.chat(max_tokens=480, ignore_eos=True, logit_bias={"5": 50}, n=8)
    late.join()
    expected = {300: (503, "server_error"), 0.2: (504, "timeout_error")}[timeout]
    assert (refused.status_code, refused.json()["error"]["type"]) == expected


def test_metrics_count_what_was_served(client: Client) -> None:
    client.chat(n=2, steering=STEERING)
    client.chat(temperature=-1)
    text = client.get("/metrics").text
    assert 'trimtab:request_success_total{finished_reason="length"} 2.0' in text
    assert 'trimtab:request_refused_total{status="400"} 1.0' in text
    for name in ("generation_tokens_total", "time_to_first_token_seconds", "inter_token_latency_seconds"):
        assert f"trimtab:{name}" in text
    assert "trimtab:request_branches_sum 6.0" in text
    assert "trimtab:num_requests_running 0.0" in text


@pytest.fixture
def held(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[AsyncEngine, threading.Event]]:
    """An engine with room for one waiting answer, which takes no step before the event."""
    engine = AsyncEngine.from_pretrained(str(tiny_folder), kv_cache_memory="2MiB", max_waiting=1)
    go, step = threading.Event(), engine._core.step

    def late() -> None:
        go.wait(60)
        step()

    monkeypatch.setattr(engine._core, "step", late)
    yield engine, go
    go.set()
    engine.shutdown()


def test_too_many_waiting_are_told_to_come_again(held: tuple[AsyncEngine, threading.Event]) -> None:
    engine, go = held
    client = Client(create_app(engine))
    first = engine.submit(Request("a", sampling=SamplingParams(max_tokens=2)))
    soon(lambda: engine.stats.waiting)
    refused = client.chat()
    assert error(refused, 429)["code"] == "rate_limit_exceeded"
    assert refused.headers["retry-after"] == "1"
    assert client.chat(stream=True).status_code == 429
    go.set()
    first.result()
    assert client.chat().status_code == 200


def test_a_broken_engine_is_not_healthy_and_says_so(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = AsyncEngine.from_pretrained(str(tiny_folder), kv_cache_memory="2MiB")
    client = Client(create_app(engine))

    def fail() -> None:
        raise OSError("a disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(engine._core, "step", fail)
        assert "a disk is gone" in error(client.chat(), 503)["message"]
        *_, last = events(client.chat(stream=True))
        assert "a disk is gone" in last["error"]["message"]
    assert client.chat().status_code == 200
    engine.shutdown()
    assert error(client.get("/health"), 503)["message"] == "the engine is closed"
    error(client.chat(), 503)


def test_numbers_that_json_lacks_are_null() -> None:
    from trimtab.engine.strict_json import dumps  # noqa: PLC0415

    assert json.loads(dumps({"a": [float("nan"), (1.0, float("inf"))]})) == {"a": [None, [1.0, None]]}


def test_every_sampling_field_is_known_to_the_api(client: Client) -> None:
    schema = client.get("/openapi.json").json()["paths"]["/v1/chat/completions"]["post"]["requestBody"]
    properties = schema["content"]["application/json"]["schema"]["properties"]
    assert set(SAMPLING) <= set(properties)
    assert all(properties[name]["description"] for name in SAMPLING)


def test_a_small_body_cannot_ask_for_much_work(client: Client) -> None:
    """Each branch is a prompt to make: too many are refused before any, a long one before the second."""
    wishes = [{"text": f"wish {index}", "weight": 0} for index in range(20_000)]
    start = time.perf_counter()
    refused = error(client.chat(steering={"objectives": [*wishes, "a"]}), 400)
    assert "20002 branches" in refused["message"]
    many = [f"wish {index}" for index in range(11)]
    long = [{"role": "user", "content": "ab " * 20_000}]
    refused = error(client.chat(messages=long, steering={"objectives": many}), 400)
    assert refused["code"] == "context_length_exceeded"
    assert refused["param"] == "messages"
    assert time.perf_counter() - start < 10
    assert error(client.chat(stop="a" * 257), 400)["param"] == "stop"


@pytest.mark.parametrize("steering", [{"objectives": ["a"], "max_model_len": 1}, {"method": "max_model_len"}])
def test_only_what_is_too_long_is_called_so(client: Client, steering: dict[str, Any]) -> None:
    refused = error(client.chat(steering=steering), 400)
    assert "max_model_len" in refused["message"]
    assert refused["code"] is None


def test_what_cannot_be_written_as_text_is_still_told(client: Client) -> None:
    for body in (b'{"\\ud800": 1}', b'{"messages": [], "steering": {"method": "base", "\\ud800": 1}}'):
        kind = {"content-type": "application/json"}
        error(client("POST", "/v1/chat/completions", content=body, headers=kind), 400)


def test_bans_of_every_token_are_the_clients_mistake(client: Client) -> None:
    banned = {str(index): -1e30 for index in range(300)}
    body = {"min_tokens": 6, "stop_token_ids": list(range(300))}
    assert "no finite score" in error(client.chat(**body), 400)["message"]
    *_, last = events(client.chat(**body, stream=True))
    assert last["error"]["type"] == "invalid_request_error"
    assert client.chat(logit_bias=banned).status_code == 200  # all alike is still a choice


def test_a_client_that_leaves_in_its_body_leaves_nothing_behind(one_async_engine: AsyncEngine) -> None:
    app = create_app(one_async_engine)

    async def leave() -> None:
        async def receive() -> dict[str, Any]:
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            pass

        kind = [(b"content-type", b"application/json")]
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/completions",
            "headers": kind,
            "query_string": b"",
        }
        await app(scope, receive, send)  # type: ignore[arg-type]

    async def many() -> int:
        for _ in range(50):
            await leave()
        gc.collect()
        return sum(type(each) is HttpRequest for each in gc.get_objects())

    assert asyncio.run(many()) <= 1


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ({"role": "tool", "content": "x"}, "the role of messages[0]"),
        ({"role": "assistant", "content": None, "tool_calls": [{"id": "x"}]}, "'tool_calls'"),
        ({"role": "user", "content": "x", "audio": {"id": "y"}}, "'audio'"),
        ({"role": "user", "content": {"x": "y" * 5000}}, "it must be a text"),
    ],
)
def test_parts_of_a_message_that_would_not_be_seen_are_refused(
    client: Client, message: dict[str, Any], says: str
) -> None:
    refused = error(client.chat(messages=[message]), 400)
    assert refused["param"] == "messages"
    assert says in refused["message"]
    assert len(refused["message"]) < 400
    assert (
        client.chat(messages=[{"role": "user", "content": "x", "name": "y", "tool_calls": []}]).status_code
        == 200
    )


def test_two_lengths_that_disagree_are_refused(client: Client) -> None:
    assert error(client.chat(max_tokens=3, max_completion_tokens=7), 400)["param"] == "max_tokens"
    assert client.chat(max_tokens=3, max_completion_tokens=3).status_code == 200
    for key in ("05", " 5 ", "1_0", "-1"):
        assert error(client.chat(logit_bias={key: 1}), 400)["param"] == "logit_bias"


def test_a_key_is_asked_for_wherever_the_application_is_mounted(one_async_engine: AsyncEngine) -> None:
    for root, at in (("/", ""), ("/v", ""), ("", "/llm"), ("", "")):
        outer = FastAPI(root_path=root)
        outer.mount(at, create_app(one_async_engine, ServerConfig(api_key="secret")))
        assert Client(outer).get(f"{at}/v1/models").status_code == 401
        for written in ("Bearer secret", "bearer  secret "):
            headers = {"authorization": written}
            assert Client(outer).get(f"{at}/v1/models", headers=headers).status_code == 200


@pytest.mark.parametrize("depth", [100, 900, 3000, 30_000])
@pytest.mark.parametrize("where", ['"chat_template_kwargs": {"x": %s}', '"metadata": %s', '"messages": %s'])
def test_a_body_that_is_nested_deep_is_served_or_refused(client: Client, where: str, depth: int) -> None:
    deep = "[" * depth + "]" * depth
    head = '{"max_tokens": 1, "messages": [{"role": "user", "content": "Why?"}], '
    kind = {"content-type": "application/json"}
    raw = (head + where % deep + "}").encode()
    response = client("POST", "/v1/chat/completions", content=raw, headers=kind)
    if response.status_code != 200 or where == '"messages": %s':
        error(response, 400)
