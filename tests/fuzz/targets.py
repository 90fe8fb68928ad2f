"""All formats that strangers give, by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .gguf_target import gguf
from .model_folders import beside, config, index, safetensors, tokenizer_json, tokenizer_model
from .request_formats import batch, bodies, profiles, questions
from .target import Target

TARGETS: dict[str, Callable[[Path], Target]] = {
    "safetensors": safetensors,
    "index": index,
    "config": config,
    "tokenizer.json": tokenizer_json,
    "tokenizer.model": tokenizer_model,
    "tokenizer_config": beside("tokenizer_config__json"),
    "special_tokens_map": beside("special_tokens_map__json"),
    "added_tokens": beside("added_tokens__json"),
    "generation_config": beside("generation_config__json"),
    "gguf": gguf,
    "profiles": profiles,
    "bodies": bodies,
    "batch": batch,
    "questions": questions,
}
