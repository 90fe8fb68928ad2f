"""All formats of untrusted input, by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from .gguf_target import gguf_target
from .model_folders import config, index, safetensors, tokenizer_file_target, tokenizer_json, tokenizer_model
from .request_formats import batch_target, bodies_target, profiles_target, questions_target
from .target import FuzzTarget

TARGETS: dict[str, Callable[[Path], FuzzTarget]] = {
    "safetensors": safetensors,
    "index": index,
    "config": config,
    "tokenizer.json": tokenizer_json,
    "tokenizer.model": tokenizer_model,
    "tokenizer_config": tokenizer_file_target("tokenizer_config__json"),
    "special_tokens_map": tokenizer_file_target("special_tokens_map__json"),
    "added_tokens": tokenizer_file_target("added_tokens__json"),
    "generation_config": tokenizer_file_target("generation_config__json"),
    "gguf": gguf_target,
    "profiles": profiles_target,
    "bodies": bodies_target,
    "batch": batch_target,
    "questions": questions_target,
}
