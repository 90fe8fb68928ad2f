"""What strangers give, by format: sound inputs, how to damage them, and what is then done with one.

Each target is the whole way that people go: a model folder is described, opened and asked; a file of prompts
is answered by the command; a body goes through the server.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import shutil
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx2 as httpx
import torch
from sentencepiece import SentencePieceProcessor
from trimtab.engine import AsyncEngine, Engine, Request, SamplingParams
from trimtab.engine.server import ServerConfig, create_app
from trimtab.kernels.errors import InputError, RunError
from trimtab.models.config import ModelConfig
from trimtab.models.llama import held_bytes, shapes
from trimtab.tools import cli, info
from trimtab.tools.evaluate import question

from ..models import ggufs, vocabularies
from ..tiny import CHAT_TEMPLATE, Tiny, write_json, write_tensors
from .files import gguf_damaged, protobuf_damaged, safetensors_damaged
from .mutators import EXTREMES, TEXTS, damaged, json_damaged

if TYPE_CHECKING:
    from random import Random

INDEX = "model.safetensors.index.json"
ASKED = "What is <|im_end|> rain, 東京 e\u0301?"
SMALL = 64 << 20
"""Bytes of weights that a damaged config.json is given at random."""


@dataclass(frozen=True)
class Target:
    """`take` gets which seed an input was made of, and raises InputError or RunError when it refuses it."""

    seeds: list[bytes]
    damage: Callable[[bytes, Random], bytes]
    take: Callable[[int, bytes], None]


def used(model: Path) -> None:
    """The model is described, opened, and says a few words."""
    refusals: list[InputError | RunError] = []
    for step in (_described, _asked):
        try:
            step(model)
        except (InputError, RunError) as error:
            refusals.append(error)
    if refusals:
        raise refusals[-1]


def _described(model: Path) -> None:
    info.table(info.describe(str(model)))


def _asked(model: Path, **settings: Any) -> None:
    engine = Engine.from_pretrained(str(model), kv_cache_memory="1MiB", max_model_len=200, **settings)
    sampling = SamplingParams(max_tokens=3, stop=("zz",))
    engine.generate(Request(ASKED, sampling=sampling))
    ids = engine.tokenizer.encode(ASKED)[:50]
    engine.generate(Request(branch_token_ids=[ids or [0]], sampling=sampling))


def of_folder(name: str, damage: Callable[[bytes, Random], bytes], *models: Path) -> Target:
    """A file of a model folder; what is beside it is sound. A seed is its content in one of the models."""
    here = models[0].parent / "damaged"

    def take(seed: int, data: bytes) -> None:
        shutil.rmtree(here, ignore_errors=True)
        shutil.copytree(models[seed], here)
        (here / name).write_bytes(data)
        used(here)

    return Target([(model / name).read_bytes() for model in models], damage, take)


def safetensors(folder: Path) -> Target:
    return of_folder("model.safetensors", safetensors_damaged, Tiny().write(folder / "one"))


def index(folder: Path) -> Target:
    return of_folder(INDEX, json_damaged, Tiny(tied=False, shards=3).write(folder / "three"))


def config(folder: Path) -> Target:
    """A config.json with its checkpoint, and where the sizes allow it with random weights in its shape."""
    models = []
    for place, changes in enumerate(CONFIGS):
        model = Tiny().write(folder / f"of{place}")
        data = {**Tiny().config(), **changes}
        write_json(model / "config.json", data)
        generator = torch.Generator().manual_seed(0)
        sizes = shapes(ModelConfig.from_dict(data))
        write_tensors(model, {name: torch.randn(size, generator=generator) for name, size in sizes.items()})
        models.append(model)
    target = of_folder("config.json", json_damaged, *models)

    def take(seed: int, data: bytes) -> None:
        here = folder / "damaged"
        try:
            target.take(seed, data)
        finally:
            shape = ModelConfig.from_folder(here)
            if held_bytes(shape, 4, torch.device("cpu")) < SMALL:
                _asked(here, load_format="dummy")

    return Target(target.seeds, json_damaged, take)


CONFIGS: list[dict[str, Any]] = [
    {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}, "head_dim": 6},
    {
        "architectures": ["Qwen3ForCausalLM"],
        "head_dim": 6,
        "use_sliding_window": True,
        "sliding_window": 9,
        "max_window_layers": 1,
        "layer_types": ["full_attention", "sliding_attention"],
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 500.0,
            "factor": 4.0,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 0.5,
            "attention_factor": 1.2,
            "original_max_position_embeddings": 128,
        },
    },
    {
        "attention_bias": True,
        "mlp_bias": True,
        "partial_rotary_factor": 1.0,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    {
        "architectures": ["MistralForCausalLM"],
        "sliding_window": 16,
        "rope_parameters": {"rope_type": "dynamic", "factor": 3.0},
    },
]
VOCABULARIES = (vocabularies.byte_level, vocabularies.byte_fallback, vocabularies.unigram)
SPECIAL: dict[str, Any] = {
    "bos_token": "<s>",
    "eos_token": {
        "content": "</s>",
        "lstrip": False,
        "rstrip": True,
        "single_word": False,
        "normalized": False,
    },
    "additional_special_tokens": ["<|im_start|>", {"content": "<|im_end|>", "special": True}],
}
ROWS = 640
"""Of embeddings, for the largest of the vocabularies."""


def _spoken(folder: Path, **files: Any) -> Path:
    """A model whose chats are ChatML; `files` are written beside it."""
    model = Tiny(rows=ROWS).write(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    (model / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    for name, content in files.items():
        path = model / name.replace("__", ".")
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
    return model


def tokenizer_json(folder: Path) -> Target:
    models = [
        _spoken(folder / f"v{place}", tokenizer__json=make().to_str().encode())
        for place, make in enumerate(VOCABULARIES)
    ]
    return of_folder("tokenizer.json", json_damaged, *models)


def tokenizer_model(folder: Path) -> Target:
    kinds = ("Llama", "BPE as by default", "unigram as by default", "unigram with bytes")
    models = [
        _spoken(
            folder / f"v{place}",
            tokenizer__model=vocabularies.sentencepiece_model(**vocabularies.MODELS[kind]),
        )
        for place, kind in enumerate(kinds)
    ]
    return of_folder("tokenizer.model", protobuf_damaged, *models)


def _beside(name: str) -> Callable[[Path], Target]:
    """A JSON file beside either kind of tokenizer."""

    def make(folder: Path) -> Target:
        made = vocabularies.byte_level()
        decoder = {
            str(made.token_to_id(text)): {"content": text, "special": True} for text in ("<s>", "</s>")
        }
        pieces = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "legacy": False}
        llama = vocabularies.sentencepiece_model(**vocabularies.LLAMA)
        beside = {
            "tokenizer_config__json": (
                {**SPECIAL, "add_bos_token": True, "added_tokens_decoder": decoder, "model_max_length": 512},
                {
                    **pieces,
                    "add_bos_token": True,
                    "add_eos_token": False,
                    "add_prefix_space": True,
                    "added_tokens_decoder": {"430": {"content": "<x>", "lstrip": True, "special": False}},
                },
            ),
            "special_tokens_map__json": (SPECIAL, {**pieces, "pad_token": {"content": "<s>"}}),
            "added_tokens__json": ({"<s>": made.token_to_id("<s>")}, {"<x>": 430, "<y>": 431}),
            "generation_config__json": ({"bos_token_id": 1, "eos_token_id": [2, 3]}, {"eos_token_id": 2}),
        }[name]
        models = [
            _spoken(folder / "json", tokenizer__json=made.to_str().encode(), **{name: beside[0]}),
            _spoken(folder / "model", tokenizer__model=llama, **{name: beside[1]}),
        ]
        return of_folder(name.replace("__", "."), json_damaged, *models)

    return make


def gguf(folder: Path) -> Target:
    """A .gguf file, which is converted, and the folder that comes of it."""
    os.environ["TRIMTAB_CACHE"] = str(folder / "cache")
    here = folder / "damaged.gguf"
    scaled = {
        "llama.context_length": 512,
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 4.0,
    }
    files = [
        ggufs.write(folder / "a.gguf", scaled, ggufs.tensors("F16")),
        ggufs.write(
            folder / "b.gguf", {"qwen2.context_length": 512}, ggufs.tensors("Q8_0", "qwen2"), "qwen2"
        ),
        ggufs.write(
            folder / "c.gguf", {**_pieces(), "llama.context_length": 512}, ggufs.tensors("Q4_0", vocab=420)
        ),
    ]

    def take(seed: int, data: bytes) -> None:
        shutil.rmtree(folder / "cache", ignore_errors=True)
        here.write_bytes(data)
        used(here)

    return Target([file.read_bytes() for file in files], gguf_damaged, take)


def _pieces() -> dict[str, Any]:
    """The metadata of a SentencePiece vocabulary."""
    model = SentencePieceProcessor(model_proto=vocabularies.sentencepiece_model(**vocabularies.LLAMA))
    ids = range(len(model))
    kinds = [
        2 if model.is_unknown(i) else 3 if model.is_control(i) else 6 if model.is_byte(i) else 1 for i in ids
    ]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": None,
        "tokenizer.ggml.merges": None,
        "tokenizer.ggml.tokens": [model.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": [float(model.get_score(i)) for i in ids],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


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
            status = cli.main(["generate", *flags])
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


TARGETS: dict[str, Callable[[Path], Target]] = {
    "safetensors": safetensors,
    "index": index,
    "config": config,
    "tokenizer.json": tokenizer_json,
    "tokenizer.model": tokenizer_model,
    "tokenizer_config": _beside("tokenizer_config__json"),
    "special_tokens_map": _beside("special_tokens_map__json"),
    "added_tokens": _beside("added_tokens__json"),
    "generation_config": _beside("generation_config__json"),
    "gguf": gguf,
    "profiles": profiles,
    "bodies": bodies,
    "batch": batch,
    "questions": questions,
}
