"""The HTTP application in this process on the tiny model: routes, limits, response formats."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fastapi import FastAPI
from trimtab.engine import Amulet, AsyncEngine, Guidance, Mato, Objective, Request, SamplingParams
from trimtab.engine.methods.builtin import METHODS
from trimtab.engine.server import create_app
from trimtab.engine.server.steering import Profiles
from trimtab.kernels.common.errors import InputError

from ...harness import get_core, get_thread
from ...helpers.polling import wait_until
from .conftest import QUESTION, STEERING, Client, ClientFactory, parse_error, parse_sse


def test_the_information_endpoints_describe_the_server(client: Client) -> None:
    assert client.get("/health").json() == {"status": "ok"}
    assert "version" in client.get("/version").json()
    assert client.get("/v1/models").json()["data"][0]["max_model_len"] == 512
    assert client.get("/v1/models/tiny").json()["id"] == "tiny"
    assert parse_error(client.get("/v1/models/other"), 404)["code"] == "model_not_found"
    methods = client.get("/v1/steer/methods").json()["methods"]
    assert [method["name"] for method in methods] == [cls.name for cls in METHODS]
    assert client.get("/docs").status_code == 200
    described = client.get("/openapi.json").json()
    assert "/v1/chat/completions" in described["paths"]


def test_a_chat_answer_equals_the_engines_output(client: Client, tiny_async_engine: AsyncEngine) -> None:
    method = Mato([Objective("Be kind.", 2), Objective("Be brief.")], kl_budget=0.3)
    sampling = SamplingParams(max_tokens=20, temperature=0.8, seed=3, top_k=50, ignore_eos=True)
    expected = tiny_async_engine.submit(Request(QUESTION, method, sampling)).result()
    body = {
        "max_tokens": 20,
        "temperature": 0.8,
        "seed": 3,
        "top_k": 50,
        "ignore_eos": True,
        "steering": {**STEERING, "method": "mato", "kl_budget": 0.3, "trace": True},
    }
    answer = client.chat(**body).json()
    choice = answer["choices"][0]
    assert choice["message"]["content"] == expected.text
    assert expected.trace is not None
    for name in ("weights", "rewards", "fulfilment", "strength", "kl", "branch_logprobs"):
        assert choice["trace"][name] == getattr(expected.trace, name)
    assert choice["fulfilment"] == expected.fulfilment == expected.trace.fulfilment[-1]
    assert choice["notes"] == ["mato uses only the ratios of the weights: they become 0.667, 0.333"]
    lengths = [len(branch.prompt_token_ids) for branch in expected.branches]
    assert answer["usage"] == {
        "prompt_tokens": lengths[0],
        "completion_tokens": 20,
        "total_tokens": lengths[0] + 20,
        "prompt_tokens_details": {"branches": lengths[1:]},
    }
    chunks = parse_sse(client.chat(**body, stream=True))
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks) == expected.text
    assert not any("usage" in chunk for chunk in chunks)
    assert chunks[-1]["choices"][0]["fulfilment"] == expected.fulfilment


def test_presets_are_selected_by_name_and_unknown_ones_refused(
    client: Client, tiny_async_engine: AsyncEngine
) -> None:
    method = Mato.preset("balanced", [Objective("Be kind.", 2), Objective("Be brief.")], tau=3.0)
    expected = tiny_async_engine.submit(Request(QUESTION, method, SamplingParams(max_tokens=6))).result()
    body = {"max_tokens": 6, "temperature": 0}
    answer = client.chat(
        **body, steering={**STEERING, "method": "mato", "preset": "balanced", "tau": 3}
    ).json()
    assert answer["choices"][0]["message"]["content"] == expected.text
    refused = client.chat(**body, steering={**STEERING, "method": "mato", "preset": "bold"})
    assert refused.status_code == 400
    assert refused.json()["error"]["message"] == "mato has no preset 'bold'; presets are balanced"
    assert refused.json()["error"]["param"] == "steering.preset"
    (mato,) = (each for each in client.get("/v1/steer/methods").json()["methods"] if each["name"] == "mato")
    assert mato["presets"] == Mato.presets


def test_a_negative_prompt_steers_by_guidance_away_from_it(
    client: Client, tiny_async_engine: AsyncEngine
) -> None:
    plain, rude = tiny_async_engine.render(Request(QUESTION, Guidance([Objective("Be rude.")])))
    request = Request(
        branch_token_ids=[rude.prompt_token_ids, plain.prompt_token_ids],
        steering=Guidance([Objective("any")], guidance_scale=1.8),
        sampling=SamplingParams(max_tokens=6),
    )
    expected = tiny_async_engine.submit(request).result()
    answer = client.chat(temperature=0, guidance_scale=1.8, negative_prompt="Be rude.").json()
    assert answer["choices"][0]["message"]["content"] == expected.text
    assert parse_error(client.chat(guidance_scale=1.8), 400)["param"] == "guidance_scale"
    assert client.chat(guidance_scale=1).status_code == 200


def test_a_completion_puts_the_objective_before_the_text(
    client: Client, tiny_async_engine: AsyncEngine
) -> None:
    encode = tiny_async_engine.tokenizer.encode
    request = Request(
        branch_token_ids=[encode("Why", True), encode("Be kind.\n\nWhy", True)],
        steering=Amulet([Objective("Be kind.")]),
        sampling=SamplingParams(max_tokens=6),
    )
    expected = tiny_async_engine.submit(request).result()
    steering = {"method": "amulet", "objectives": ["Be kind."]}
    assert client.complete(temperature=0, steering=steering).json()["choices"][0]["text"] == expected.text
    assert parse_error(client.complete(prompt=[5, 6], steering=steering), 400)["param"] == "prompt"


def test_the_preview_shows_the_branches(client: Client, tiny_async_engine: AsyncEngine) -> None:
    body = {"messages": QUESTION, "steering": STEERING}
    preview = client("POST", "/v1/steer/preview", json=body).json()
    prompts = tiny_async_engine.render(Request(QUESTION, {"Be kind.": 2, "Be brief.": 1}))
    assert preview["branches"] == [
        {"name": each.name, "prompt": each.prompt, "tokens": len(each.prompt_token_ids)} for each in prompts
    ]
    assert (preview["method"], preview["weights"]) == ("trim", [2, 1])
    doubtful = {**body, "steering": {"method": "amulet", **STEERING}}
    assert "uneven weights" in client("POST", "/v1/steer/preview", json=doubtful).json()["notes"][0]


def test_unknown_paths_and_http_methods_are_refused(client: Client) -> None:
    assert parse_error(client.get("/v2"), 404)["message"] == "GET /v2 does not exist"
    parse_error(client.get("/v1/chat/completions"), 405)


def test_the_page_has_a_content_security_policy_that_allows_only_its_own_files(client: Client) -> None:
    for path, kind in (("/", "text/html"), ("/page.css", "text/css"), ("/page.js", "text/javascript")):
        response = client.get(path)
        headers = response.headers
        assert response.status_code == 200
        assert headers["content-type"].startswith(kind)
        assert "https://" not in response.text.replace("http://www.w3.org", "")
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


def test_the_page_has_relative_urls_when_mounted_in_another_application(
    tiny_async_engine: AsyncEngine,
) -> None:
    outer = FastAPI()
    outer.mount("/llm", create_app(tiny_async_engine))
    page = Client(outer).get("/llm/")
    assert page.status_code == 200
    assert '="/' not in page.text


def test_profiles_select_steering_by_name(make_client: ClientFactory, tmp_path: Path) -> None:
    file = tmp_path / "profiles.toml"
    file.write_text(
        '[kind]\nmethod = "mato"\nkl_budget = 0.2\n'
        'objectives = [{text = "Be kind.", weight = 2}, "Be brief."]\n'
    )
    client = make_client(profiles=str(file))
    named = client.chat(temperature=0, steering="kind").json()
    written = client.chat(temperature=0, steering={**STEERING, "method": "mato", "kl_budget": 0.2}).json()
    assert named["choices"] == written["choices"]
    assert list(client.get("/v1/steer/profiles").json()["profiles"]) == ["kind"]
    assert "profiles are kind" in parse_error(client.chat(steering="other"), 400)["message"]
    file.write_text('[kind]\nmethod = "mato"\nobjectives = ["a"]\ntau = -1\n')
    with pytest.raises(InputError, match=r"profile 'kind' .* tau of mato is -1"):
        Profiles.from_file(file)
    with pytest.raises(InputError, match="cannot read"):
        Profiles.from_file(tmp_path / "none.toml")


def test_an_answer_is_ended_after_the_request_timeout(make_client: ClientFactory) -> None:
    client = make_client(request_timeout=0.2)
    body = {"max_tokens": 400, "ignore_eos": True, "logit_bias": {"5": 50}, "n": 4}
    assert "timeout of 0.2 s" in parse_error(client.chat(**body), 504)["message"]
    *_, last = parse_sse(client.chat(**body, stream=True))
    assert last["error"]["type"] == "timeout_error"


def test_metrics_count_served_and_refused_requests(client: Client) -> None:
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
def blocked_engine(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[AsyncEngine, threading.Event]]:
    """An engine with a queue of one that takes no step before the event is set."""
    engine = AsyncEngine.from_pretrained(str(tiny_folder), kv_cache_memory="2MiB", max_waiting=1)
    proceed, step = threading.Event(), get_core(engine).step

    def wait_then_step() -> None:
        proceed.wait(60)
        step()

    monkeypatch.setattr(get_core(engine), "step", wait_then_step)
    yield engine, proceed
    proceed.set()
    engine.shutdown()


def test_a_full_queue_answers_429_with_retry_after(
    blocked_engine: tuple[AsyncEngine, threading.Event],
) -> None:
    engine, proceed = blocked_engine
    client = Client(create_app(engine))
    first = engine.submit(Request("a", sampling=SamplingParams(max_tokens=2)))
    wait_until(lambda: engine.stats.waiting)
    refused = client.chat()
    assert parse_error(refused, 429)["code"] == "rate_limit_exceeded"
    assert refused.headers["retry-after"] == "1"
    assert client.chat(stream=True).status_code == 429
    proceed.set()
    first.result()
    assert client.chat().status_code == 200


def test_an_answer_aborted_by_shutdown_is_503_and_not_a_timeout(
    blocked_engine: tuple[AsyncEngine, threading.Event],
) -> None:
    engine, proceed = blocked_engine
    with ThreadPoolExecutor(1) as pool:
        calling = pool.submit(Client(create_app(engine)).chat)
        wait_until(lambda: engine.stats.waiting)
        get_thread(engine)._finalizer()
        proceed.set()
        assert parse_error(calling.result(60), 503)["message"] == "the engine was closed"


def test_a_broken_engine_reports_unhealthy_with_the_reason(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = AsyncEngine.from_pretrained(str(tiny_folder), kv_cache_memory="2MiB")
    client = Client(create_app(engine))

    def fail() -> None:
        raise OSError("a disk is gone")

    with monkeypatch.context() as patch:
        patch.setattr(get_core(engine), "step", fail)
        assert "a disk is gone" in parse_error(client.chat(), 503)["message"]
        *_, last = parse_sse(client.chat(stream=True))
        assert "a disk is gone" in last["error"]["message"]
    assert client.chat().status_code == 200
    engine.shutdown()
    assert parse_error(client.get("/health"), 503)["message"] == "the engine is closed"
    parse_error(client.chat(), 503)
