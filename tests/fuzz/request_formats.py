"""Fuzz targets for requests: server bodies and profiles, prompt files and question files."""

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

from ..helpers.tiny_model import TinyModel
from .mutators import EXTREME_NUMBERS, ODD_TEXTS, damage_bytes, damage_json
from .target import FuzzTarget

if TYPE_CHECKING:
    from pathlib import Path
    from random import Random


class _ServerApp:
    """The server application on the tiny model, called in this process."""

    def __init__(self, folder: Path) -> None:
        self._engine = AsyncEngine.from_pretrained(
            str(TinyModel().write(folder / "tiny")), kv_cache_memory="1MiB", max_model_len=96, max_waiting=8
        )
        self._loop = asyncio.new_event_loop()

    def app(self, **settings: Any) -> Any:
        """Create the application. Raises InputError for invalid settings."""
        return create_app(self._engine, ServerConfig(request_timeout=8, **settings))

    def call(self, app: Any, method: str, path: str, data: bytes = b"") -> None:
        """Send a request. Raises InputError for a 4xx in OpenAI's format, AssertionError if malformed."""
        response = self._loop.run_until_complete(self._request(app, method, path, data))
        status, text = response.status_code, response.text
        if status == 200:
            is_stream = response.headers["content-type"].startswith("text/event-stream")
            assert text.endswith("data: [DONE]\n\n") if is_stream else json.loads(text), text[-500:]
            return
        error = json.loads(text)["error"]
        assert 400 <= status < 500, f"{status} {text[:500]}"
        assert set(error) == {"message", "type", "param", "code"}, text[:500]
        raise InputError(error["message"])

    async def _request(self, app: Any, method: str, path: str, data: bytes) -> httpx.Response:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            headers = {"Content-Type": "application/json"}
            return await client.request(method, path, content=data, headers=headers)


def bodies_target(folder: Path) -> FuzzTarget:
    server = _ServerApp(folder)
    app = server.app(log_prompts=True)

    def run(seed: int, data: bytes) -> None:
        path = "/v1/chat/completions" if b'"prompt"' not in data else "/v1/completions"
        if b'"preview"' in data:
            path = "/v1/steer/preview"
        server.call(app, "POST", path, data)

    return FuzzTarget([json.dumps(body).encode() for body in BODIES], damage_json, run)


CHAT_BODY: dict[str, Any] = {
    "messages": [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": [{"type": "text", "text": "Why?"}]},
    ],
    "max_tokens": 4,
    "temperature": 0.5,
    "seed": 3,
}
STEERING: dict[str, Any] = {
    "method": "mato",
    "objectives": [{"text": "Be brief.", "weight": 0.7}, "Be kind."],
    "preset": "balanced",
    "trace": True,
}
BODIES: list[dict[str, Any]] = [
    {**CHAT_BODY, "steering": STEERING, "n": 2, "logprobs": True, "top_logprobs": 2, "user": "me"},
    {**CHAT_BODY, "stream": True, "stream_options": {"include_usage": True}, "stop": ["x", "yy"], "top_k": 5},
    {**CHAT_BODY, "negative_prompt": "Be rude.", "guidance_scale": 1.5, "logit_bias": {"7": -3.0}},
    {
        **CHAT_BODY,
        "metadata": {"preview": "yes"},
        "steering": {"method": "amulet", "objectives": ["Be brief."]},
    },
    {"prompt": ["Why", "How"], "max_tokens": 3, "echo": False, "logprobs": 2, "top_p": 0.9, "min_p": 0.01},
    {"prompt": [1, 2, 3], "max_tokens": 3, "repetition_penalty": 1.1, "stop_token_ids": [5], "min_tokens": 1},
    {"prompt": "Why", "max_tokens": 3, "steering": STEERING, "presence_penalty": 0.1, "stream": True},
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
ODD_TOML = [
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
ODD_TOML += ["[" * 5000, "[" * 400 + "]" * 400, "{a=" * 400 + "1" + "}" * 400, "9" * 5000, "0x" + "f" * 5000]
ODD_TOML += ['"\\ud800"', '"\\U00110000"', "true", "[]", "[[]]", "-0.0", "a.b.c", *map(str, EXTREME_NUMBERS)]
ODD_TOML += [json.dumps(text) for text in ODD_TEXTS]


def profiles_target(folder: Path) -> FuzzTarget:
    server, path = _ServerApp(folder), folder / "profiles.toml"

    def run(seed: int, data: bytes) -> None:
        path.write_bytes(data)
        server.call(server.app(profiles=str(path)), "GET", "/v1/steer/profiles")

    return FuzzTarget([PROFILES], damage_toml, run)


def damage_toml(data: bytes, rng: Random) -> bytes:
    """Change, duplicate or delete lines; sometimes arbitrary bytes."""
    if rng.random() < 0.3:
        return damage_bytes(data, rng)
    lines = data.decode().split("\n")
    for _ in range(rng.choice((1, 1, 2, 4))):
        index = rng.randrange(len(lines))
        key, equals, value = lines[index].partition("=")
        odd_text = rng.choice(ODD_TOML)
        lines[index] = rng.choice(
            (
                f"{key}= {odd_text}",
                f"{key}= [{odd_text}, {value or 1}]",
                f"{odd_text} {equals}{value}",
                f"{'a.' * rng.choice((2, 900, 5000))}a = {odd_text}",
                f"[{odd_text}]",
                f"[{'a.' * rng.choice((2, 900))}a]",
                "",
                f"{lines[index]}\n{lines[index]}",
            )
        )
    return "\n".join(lines).encode("utf-8", "surrogatepass")


PROMPT_LINES = (
    "What is rain?",
    {
        "prompt": "What is snow?",
        "id": {"of": ["s", 1]},
        "prefer": ["Be brief.=0.7", "Be kind."],
        "max_tokens": 2,
    },
    {
        "messages": CHAT_BODY["messages"],
        "temperature": 1,
        "seed": 3,
        "n": 2,
        "stop": ["x"],
        "logit_bias": {"7": 1},
    },
)


def batch_target(folder: Path) -> FuzzTarget:
    """`trimtab generate --input`: an invalid line gets an error, the others their answers."""
    model, source, target = TinyModel().write(folder / "tiny"), folder / "in.jsonl", folder / "out.jsonl"
    flags = ["--input", str(source), "--output", str(target), "--model", str(model), "--max-tokens", "3"]
    flags += ["--kv-cache-memory", "1MiB", "--max-model-len", "128"]

    def run(seed: int, data: bytes) -> None:
        source.write_bytes(data)
        target.unlink(missing_ok=True)
        stderr = io.StringIO()
        with redirect_stderr(stderr), redirect_stdout(io.StringIO()):
            status = main.main(["generate", *flags])
        if not target.exists():
            raise InputError(stderr.getvalue().strip())
        prompts = [line for line in data.decode("utf-8-sig").split("\n") if line.strip()]
        answers = [json.loads(line) for line in target.read_text(encoding="utf-8").splitlines()]
        assert len(answers) == len(prompts), stderr.getvalue()
        failures = [answer["error"] for answer in answers if answer.get("error")]
        assert status == bool(failures), stderr.getvalue()
        if failures:
            raise InputError(max(failures, key=len))

    return FuzzTarget(["\n".join(map(json.dumps, PROMPT_LINES)).encode()], damage_lines, run)


def damage_lines(data: bytes, rng: Random) -> bytes:
    """Damage one line as JSON, or the entire file as bytes."""
    if rng.random() < 0.1:
        return damage_bytes(data, rng)
    lines = data.split(b"\n")
    index = rng.randrange(len(lines))
    return b"\n".join([*lines[:index], damage_json(lines[index], rng), *lines[index + 1 :]])


QUESTION_ROWS: list[Any] = [
    {"index": 0, "question": "Why?", "preferences": ["Be brief.", {"criteria": "Be kind."}]},
    {"index": 4, "prompt": "How?", "rubric": [{"preference": "Be é."}]},
    "Where?",
]


def questions_target(folder: Path) -> FuzzTarget:
    path = folder / "questions.json"

    def run(seed: int, data: bytes) -> None:
        path.write_bytes(data)
        question.questions_digest(question.read_questions(str(path)))

    def damage(data: bytes, rng: Random) -> bytes:
        return damage_json(data, rng) if data.startswith(b"[") else damage_lines(data, rng)

    lines = "\n".join(map(json.dumps, QUESTION_ROWS)).encode()
    return FuzzTarget([json.dumps(QUESTION_ROWS).encode(), lines], damage, run)
