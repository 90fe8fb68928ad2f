"""The files of a model folder: one is damaged, the rest is sound; then the model is opened and asked."""

from __future__ import annotations

import json
import shutil
from typing import TYPE_CHECKING, Any

import torch
from trimtab.engine import Engine, Request, SamplingParams
from trimtab.kernels.common.errors import InputError, RunError
from trimtab.models.config import ModelConfig
from trimtab.models.llama import held_bytes, shapes
from trimtab.tools.commands import info

from ..helpers import vocabularies
from ..helpers.tiny_model import CHAT_TEMPLATE, Tiny, write_json, write_tensors
from .binary_formats import protobuf_damaged, safetensors_damaged
from .mutators import json_damaged
from .target import Target

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from random import Random

INDEX = "model.safetensors.index.json"
ASKED = "What is <|im_end|> rain, 東京 e\u0301?"
SMALL = 64 << 20
"""Bytes of weights that a damaged config.json is given at random."""


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


def beside(name: str) -> Callable[[Path], Target]:
    """Of a JSON file beside either kind of tokenizer."""

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
