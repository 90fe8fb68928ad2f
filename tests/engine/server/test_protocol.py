"""Request bodies: accepted fields, and errors that name the refused ones."""

from __future__ import annotations

import asyncio
import gc
import time
from typing import Any

import jsonschema_rs
import pytest
from starlette.requests import Request as HttpRequest
from trimtab.engine import AsyncEngine, SamplingParams
from trimtab.engine.server import create_app
from trimtab.engine.server.protocol import (
    NOOP_VALUES,
    ROLES,
    SAMPLING_FIELDS,
    ChatCompletionRequest,
    parse_body,
)

from .conftest import QUESTION, STEERING, Client, ClientFactory, parse_error, parse_sse


@pytest.mark.parametrize("name", NOOP_VALUES)
def test_no_op_values_of_unsupported_fields_are_accepted_and_all_others_refused(
    client: Client, name: str
) -> None:
    for value in (None, *NOOP_VALUES[name]):
        assert client.chat(**{name: value}).status_code == 200
    for value in ({"type": "json_object"}, 1, "required", ["audio"]):
        refused = parse_error(client.chat(**{name: value}), 400)
        assert refused["param"] == name
        assert "not supported" in refused["message"]


def test_metadata_fields_of_clients_are_accepted(client: Client) -> None:
    response = client.chat(
        user="u", metadata={"a": "b"}, presence_penalty=0, frequency_penalty=0.0, n=1, logit_bias={}, top_p=1,
        stop=None, seed=None, stream=False, stream_options=None, model="tiny", logprobs=False, top_k=-1,
    )  # fmt: skip
    assert response.status_code == 200
    assert client.chat(logit_bias={"5": 1e30}, temperature=0).json()["usage"]["completion_tokens"] == 6


@pytest.mark.parametrize(
    ("body", "param", "expected"),
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
        ({"stop": ["a"] * 65}, "stop", "maximum is 64"),
        ({"top_logprobs": 2}, "top_logprobs", "unless logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "0 to 20"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "unless stream"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options", "'x'"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options", "it must be true or"),
        ({"stream": True, "stream_options": []}, "stream_options", "it must be a dictionary, or none"),
        ({"stream_options": dict.fromkeys(map(str, range(65)), 1)}, "stream_options", "65 entries"),
        ({"max_completion_tokens": 2**64}, "max_completion_tokens", "a number that fits 64 bits"),
        ({"guidance_scale": 10**400}, "guidance_scale", "a number that fits 64 bits"),
        ({"negative_prompt": 5}, "negative_prompt", "it must be a string, or none"),
        ({"stream": "yes"}, "stream", "true or false"),
        ({"messages": []}, "messages", "empty"),
        ({"messages": "hi"}, "messages", "'hi'; it must be a list of dictionaries"),
        ({"messages": [5]}, "messages", "item 0 of messages is 5; it must be a dictionary"),
        ({"messages": [{"role": "user"}]}, "messages", "empty"),
        ({"messages": [{"content": "x"}]}, "messages", "role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages",
            "only parts of",
        ),
        ({"steering": 5}, "steering", "an object"),
        ({"steering": "kind"}, "steering", "profiles are none"),
        ({"steering": {"method": "x"}}, "steering.method", "methods are trim, base"),
        ({"steering": {"method": "mato"}}, "steering", "at least one objective"),
        ({"steering": {**STEERING, "method": "mato", "tau": 0}}, "steering.tau", "above 0"),
        ({"steering": {**STEERING, "tua": 1}}, "steering.tua", "not a setting"),
        ({"steering": {**STEERING, "trace": 1}}, "steering.trace", "true or false"),
        ({"steering": {"objectives": [{"text": "a", "weight": -3}]}}, "steering.objectives[0]", "-3"),
        ({"steering": {"objectives": ["a", {"txt": "b"}]}}, "steering.objectives[1]", "a string"),
        ({"steering": {"objectives": "a"}}, "steering.objectives", "a list"),
        ({"steering": {"objectives": ["a", "a"]}}, "steering", "twice"),
        ({"steering": STEERING, "negative_prompt": "x"}, "negative_prompt", "omitted"),
    ],
)
def test_an_invalid_field_of_a_chat_is_refused_by_name(
    client: Client, body: dict[str, Any], param: str | None, expected: str
) -> None:
    response = client("POST", "/v1/chat/completions", json={"messages": QUESTION, "max_tokens": 2, **body})
    error = parse_error(response, 400)
    assert error["param"] == param
    assert expected in error["message"]


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
def test_an_invalid_field_of_a_completion_is_refused_by_name(
    client: Client, body: dict[str, Any], param: str
) -> None:
    assert parse_error(client.complete(**body), 400)["param"] == param


@pytest.mark.parametrize(
    "raw",
    [b"", b"{", b"[1]", b'"x"', b"\xff\xfe", b'{"n": NaN}', b"[" * 100_000, b'{"n": ' + b"9" * 6000 + b"}"],
)
def test_invalid_json_is_refused(client: Client, raw: bytes) -> None:
    kind = {"content-type": "application/json"}
    parse_error(client("POST", "/v1/chat/completions", content=raw, headers=kind), 400)


def test_a_lone_surrogate_is_refused(client: Client) -> None:
    raw = b'{"messages": [{"role": "user", "content": "\\ud800"}]}'
    kind = {"content-type": "application/json"}
    refused = client("POST", "/v1/chat/completions", content=raw, headers=kind)
    assert "lone surrogate" in parse_error(refused, 400)["message"]


def test_a_model_name_with_a_lone_surrogate_does_not_exist(client: Client) -> None:
    kind = {"content-type": "application/json"}
    raw = b'{"messages": [{"role": "user", "content": "x"}], "model": "\\ud800"}'
    refused = client("POST", "/v1/chat/completions", content=raw, headers=kind)
    assert parse_error(refused, 404)["code"] == "model_not_found"


def test_a_body_that_is_too_large_or_not_json_is_refused(make_client: ClientFactory) -> None:
    client = make_client(max_body_bytes=1000)
    assert client.chat().status_code == 200
    assert "1000 bytes" in parse_error(client.chat(user="x" * 1000), 413)["message"]
    kind = {"content-type": "text/plain"}
    parse_error(client("POST", "/v1/chat/completions", content=b"{}", headers=kind), 415)


def test_every_sampling_field_is_in_the_openapi_schema(client: Client) -> None:
    schema = client.get("/openapi.json").json()["paths"]["/v1/chat/completions"]["post"]["requestBody"]
    properties = schema["content"]["application/json"]["schema"]["properties"]
    assert set(SAMPLING_FIELDS) <= set(properties)
    assert all(properties[name]["description"] for name in SAMPLING_FIELDS)
    used = parse_body(ChatCompletionRequest, {"messages": QUESTION})[1]
    described = {name: properties[name].get("default") for name in SAMPLING_FIELDS}
    assert SamplingParams(**described, max_tokens=used.max_tokens) == used


def test_a_small_body_cannot_ask_for_much_work(client: Client) -> None:
    """Too many branches are refused before any prompt is made, a long prompt before the second branch."""
    objectives = [{"text": f"objective {index}", "weight": 0} for index in range(20_000)]
    start = time.perf_counter()
    refused = parse_error(client.chat(steering={"objectives": [*objectives, "a"]}), 400)
    assert "20002 branches" in refused["message"]
    many = [f"objective {index}" for index in range(11)]
    long = [{"role": "user", "content": "ab " * 20_000}]
    refused = parse_error(client.chat(messages=long, steering={"objectives": many}), 400)
    assert refused["code"] == "context_length_exceeded"
    assert refused["param"] == "messages"
    assert time.perf_counter() - start < 10
    assert parse_error(client.chat(stop="a" * 257), 400)["param"] == "stop"


@pytest.mark.parametrize("steering", [{"objectives": ["a"], "max_model_len": 1}, {"method": "max_model_len"}])
def test_only_a_prompt_beyond_the_context_gets_the_context_length_error(
    client: Client, steering: dict[str, Any]
) -> None:
    refused = parse_error(client.chat(steering=steering), 400)
    assert "max_model_len" in refused["message"]
    assert refused["code"] is None


def test_an_error_about_unprintable_text_is_still_reported(client: Client) -> None:
    for body in (b'{"\\ud800": 1}', b'{"messages": [], "steering": {"method": "base", "\\ud800": 1}}'):
        kind = {"content-type": "application/json"}
        parse_error(client("POST", "/v1/chat/completions", content=body, headers=kind), 400)


def test_banning_every_token_is_a_client_error(client: Client) -> None:
    banned = {str(index): -1e30 for index in range(300)}
    body = {"min_tokens": 6, "stop_token_ids": list(range(300))}
    assert "no finite score" in parse_error(client.chat(**body), 400)["message"]
    *_, last = parse_sse(client.chat(**body, stream=True))
    assert last["error"]["type"] == "invalid_request_error"
    assert client.chat(logit_bias=banned).status_code == 200  # equal scores still allow sampling


def test_a_client_that_disconnects_before_its_body_ends_leaks_nothing(
    tiny_async_engine: AsyncEngine,
) -> None:
    app = create_app(tiny_async_engine)

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
    ("message", "expected"),
    [
        ({"role": "tool", "content": "x"}, "the role of messages[0]"),
        ({"role": "assistant", "content": None, "tool_calls": [{"id": "x"}]}, "'tool_calls'"),
        ({"role": "user", "content": "x", "audio": {"id": "y"}}, "'audio'"),
        ({"role": "user", "content": {"x": "y" * 5000}}, "it must be a string or a list of text parts"),
    ],
)
def test_message_parts_other_than_text_are_refused(
    client: Client, message: dict[str, Any], expected: str
) -> None:
    refused = parse_error(client.chat(messages=[message]), 400)
    assert refused["param"] == "messages"
    assert expected in refused["message"]
    assert len(refused["message"]) < 400
    assert (
        client.chat(messages=[{"role": "user", "content": "x", "name": "y", "tool_calls": []}]).status_code
        == 200
    )


@pytest.mark.parametrize("role", [*ROLES, "tool"])
@pytest.mark.parametrize("content", ["x", [{"type": "text", "text": "x"}], [{"type": "image_url"}], 5])
def test_a_message_is_accepted_if_and_only_if_the_openapi_schema_accepts_it(
    client: Client, role: str, content: Any
) -> None:
    described = client.get("/openapi.json").json()["paths"]["/v1/chat/completions"]["post"]["requestBody"]
    schema = described["content"]["application/json"]["schema"]["properties"]["messages"]["items"]
    message = {"role": role, "content": content}
    taken = client.chat(messages=[{"role": "user", "content": "Why?"}, message]).status_code == 200
    assert jsonschema_rs.is_valid(schema, message) == taken
    assert taken == (role in ROLES and content not in (5, [{"type": "image_url"}]))


def test_contradictory_max_tokens_and_invalid_logit_bias_keys_are_refused(client: Client) -> None:
    assert parse_error(client.chat(max_tokens=3, max_completion_tokens=7), 400)["param"] == "max_tokens"
    assert client.chat(max_tokens=3, max_completion_tokens=3).status_code == 200
    for key in ("05", " 5 ", "1_0", "-1"):
        assert parse_error(client.chat(logit_bias={key: 1}), 400)["param"] == "logit_bias"


@pytest.mark.parametrize("depth", [100, 900, 3000, 30_000])
@pytest.mark.parametrize("where", ['"chat_template_kwargs": {"x": %s}', '"metadata": %s', '"messages": %s'])
def test_a_deeply_nested_body_is_served_or_refused(client: Client, where: str, depth: int) -> None:
    deep = "[" * depth + "]" * depth
    head = '{"max_tokens": 1, "messages": [{"role": "user", "content": "Why?"}], '
    kind = {"content-type": "application/json"}
    raw = (head + where % deep + "}").encode()
    response = client("POST", "/v1/chat/completions", content=raw, headers=kind)
    if response.status_code != 200 or where == '"messages": %s':
        parse_error(response, 400)
