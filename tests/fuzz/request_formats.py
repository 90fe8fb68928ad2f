"""What is asked: bodies of the server and its profiles, files of prompts and of questions."""

from __future__ import annotations

import asyncio
import io
import json
from contextlib import redirect_stderr, redirect_stdout
from typing import TYPE_CHECKING, Any

import httpx2 as httpx
from trimtab.engine import AsyncEngine
from trimtab.engine.server import ServerConfig, create_app
from trimtab.kernels.common.errors import InputError
from trimtab.tools.cli import main
from trimtab.tools.common import questions as question

from ..helpers.tiny_model import Tiny
from .mutators import EXTREMES, TEXTS, damaged, json_damaged
from .target import Target

if TYPE_CHECKING:
    from pathlib import Path
    from random import Random


class _Served:
    """The application over the tiny model, called in this process."""

    def __init__(self, folder: Path) -> None:
        self._engine = AsyncEngine.from_pretrained(
            str(Tiny().write(folder / "tiny")), kv_cache_memory="1MiB", max_model_len=96, max_waiting=8
        )
        self._loop = asyncio.new_event_loop()

    def app(self, **settings: Any) -> Any:
        """The application with these settings. Raises InputError when they are wrong."""
        return create_app(self._engine, ServerConfig(request_timeout=8, **settings))

    def call(self, app: Any, method: str, path: str, data: bytes = b"") -> None:
        """Raises InputError for a 4xx in OpenAI's shape, and AssertionError for what is no proper answer."""
        response = self._loop.run_until_complete(self._called(app, method, path, data))
        status, text = response.status_code, response.text
        if status == 200:
            streamed = response.headers["content-type"].startswith("text/event-stream")
            assert text.endswith("data: [DONE]\n\n") if streamed else json.loads(text), text[-500:]
            return
        error = json.loads(text)["error"]
        assert 400 <= status < 500, f"{status} {text[:500]}"
        assert set(error) == {"message", "type", "param", "code"}, text[:500]
        raise InputError(error["message"])

    async def _called(self, app: Any, method: str, path: str, data: bytes) -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            headers = {"Content-Type": "application/json"}
            return await client.request(method, path, content=data, headers=headers)


def bodies(folder: Path) -> Target:
    served = _Served(folder)
    app = served.app(log_prompts=True)

    def take(seed: int, data: bytes) -> None:
        path = "/v1/chat/completions" if b'"prompt"' not in data else "/v1/completions"
        if b'"preview"' in data:
            path = "/v1/steer/preview"
        served.call(app, "POST", path, data)

    return Target([json.dumps(body).encode() for body in BODIES], json_damaged, take)


CHAT: dict[str, Any] = {
    "messages": [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "Why?"}]},
    ],
    "max_tokens": 4,
    "temperature": 0.5,
    "seed": 3,
}
WISHES: dict[str, Any] = {
    "method": "mato",
    "objectives": [{"text": "Be brief.", "weight": 0.7}, "Be kind."],
    "preset": "balanced",
    "trace": True,
}
BODIES: list[dict[str, Any]] = [
    {**CHAT, "steering": WISHES, "n": 2, "logprobs": True, "top_logprobs": 2, "user": "me"},
    {**CHAT, "stream": True, "stream_options": {"include_usage": True}, "stop": ["x", "yy"], "top_k": 5},
    {**CHAT, "negative_prompt": "Be rude.", "guidance_scale": 1.5, "logit_bias": {"7": -3.0}},
    {**CHAT, "metadata": {"preview": "yes"}, "steering": {"method": "amulet", "objectives": ["Be brief."]}},
    {"prompt": ["Why", "How"], "max_tokens": 3, "echo": False, "logprobs": 2, "top_p": 0.9, "min_p": 0.01},
    {"prompt": [1, 2, 3], "max_tokens": 3, "repetition_penalty": 1.1, "stop_token_ids": [5], "min_tokens": 1},
    {"prompt": "Why", "max_tokens": 3, "steering": WISHES, "presence_penalty": 0.1, "stream": True},
]

PROFILES = b"""[kind-and-brief]
method = "mato"
preset = "balanced"
objectives = [{ text = "Be kind.", weight = 0.7 }, "Be brief."]
trace = true

[gentle]
method = "amulet"
alpha = 2.0
kl_budget = 0.25
objectives = ["Be \\u00e9 brief."]
"""
TOML = [
    "inf",
    "-inf",
    "nan",
    "1e400",
    "1979-05-27",
    "07:32:00",
    "1979-05-27T07:32:00Z",
    '"""x"""',
    "'\\x'",
    "{}",
]
TOML += ["[" * 5000, "[" * 400 + "]" * 400, "{a=" * 400 + "1" + "}" * 400, "9" * 5000, "0x" + "f" * 5000]
TOML += ['"\\ud800"', '"\\U00110000"', "true", "[]", "[[]]", "-0.0", "a.b.c", *map(str, EXTREMES)]
TOML += [json.dumps(text) for text in TEXTS]


def profiles(folder: Path) -> Target:
    served, path = _Served(folder), folder / "profiles.toml"

    def take(seed: int, data: bytes) -> None:
        path.write_bytes(data)
        served.call(served.app(profiles=str(path)), "GET", "/v1/steer/profiles")

    return Target([PROFILES], toml_damaged, take)


def toml_damaged(data: bytes, rng: Random) -> bytes:
    """Lines with other values or keys, twice or gone; now and then any byte."""
    if rng.random() < 0.3:
        return damaged(data, rng)
    lines = data.decode().split("\n")
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(lines))
        key, equals, value = lines[at].partition("=")
        odd = rng.choice(TOML)
        lines[at] = rng.choice(
            (
                f"{key}= {odd}",
                f"{key}= [{odd}, {value or 1}]",
                f"{odd} {equals}{value}",
                f"{'a.' * rng.choice((2, 900, 5000))}a = {odd}",
                f"[{odd}]",
                f"[{'a.' * rng.choice((2, 900))}a]",
                "",
                f"{lines[at]}\n{lines[at]}",
            )
        )
    return "\n".join(lines).encode("utf-8", "surrogatepass")


LINES = (
    "What is rain?",
    {
        "prompt": "What is snow?",
        "id": {"of": ["s", 1]},
        "prefer": ["Be brief.=0.7", "Be kind."],
        "max_tokens": 2,
    },
    {
        "messages": CHAT["messages"],
        "temperature": 1,
        "seed": 3,
        "n": 2,
        "stop": ["x"],
        "logit_bias": {"7": 1},
    },
)


def batch(folder: Path) -> Target:
    """`trimtab generate --input`: a wrong line has its error, and the rest their answers."""
    model, source, target = Tiny().write(folder / "tiny"), folder / "in.jsonl", folder / "out.jsonl"
    flags = ["--input", str(source), "--output", str(target), "--model", str(model), "--max-tokens", "3"]
    flags += ["--kv-cache-memory", "1MiB", "--max-model-len", "128"]

    def take(seed: int, data: bytes) -> None:
        source.write_bytes(data)
        target.unlink(missing_ok=True)
        said = io.StringIO()
        with redirect_stderr(said), redirect_stdout(io.StringIO()):
            status = main.main(["generate", *flags])
        if not target.exists():
            raise InputError(said.getvalue().strip())
        asked = [line for line in data.decode("utf-8-sig").split("\n") if line.strip()]
        answers = [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]
        assert len(answers) == len(asked), said.getvalue()
        failures = [answer["error"] for answer in answers if answer.get("error")]
        assert status == bool(failures), said.getvalue()
        if failures:
            raise InputError(max(failures, key=len))

    return Target(["\n".join(map(json.dumps, LINES)).encode()], lines_damaged, take)


def lines_damaged(data: bytes, rng: Random) -> bytes:
    """One of the lines as JSON damages it, or all as bytes."""
    if rng.random() < 0.1:
        return damaged(data, rng)
    lines = data.split(b"\n")
    at = rng.randrange(len(lines))
    return b"\n".join([*lines[:at], json_damaged(lines[at], rng), *lines[at + 1 :]])


ROWS_ASKED: list[Any] = [
    {"index": 0, "question": "Why?", "preferences": ["Be brief.", {"criteria": "Be kind."}]},
    {"index": 4, "prompt": "How?", "rubric": [{"preference": "Be é."}]},
    "Where?",
]


def questions(folder: Path) -> Target:
    path = folder / "questions.json"

    def take(seed: int, data: bytes) -> None:
        path.write_bytes(data)
        question.digest(question.read(str(path)))

    def damage(data: bytes, rng: Random) -> bytes:
        return json_damaged(data, rng) if data.startswith(b"[") else lines_damaged(data, rng)

    lines = "\n".join(map(json.dumps, ROWS_ASKED)).encode()
    return Target([json.dumps(ROWS_ASKED).encode(), lines], damage, take)
