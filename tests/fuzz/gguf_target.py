"""A .gguf file: damaged, converted, and the folder that comes of it used as any other."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING, Any

from sentencepiece import SentencePieceProcessor

from ..helpers import gguf_files, vocabularies
from .binary_formats import gguf_damaged
from .model_folders import used
from .target import Target

if TYPE_CHECKING:
    from pathlib import Path


def gguf(folder: Path) -> Target:
    os.environ["TRIMTAB_CACHE"] = str(folder / "cache")
    here = folder / "damaged.gguf"
    scaled = {
        "llama.context_length": 512,
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 4.0,
    }
    files = [
        gguf_files.write(folder / "a.gguf", scaled, gguf_files.tensors("F16")),
        gguf_files.write(
            folder / "b.gguf", {"qwen2.context_length": 512}, gguf_files.tensors("Q8_0", "qwen2"), "qwen2"
        ),
        gguf_files.write(
            folder / "c.gguf",
            {**_pieces(), "llama.context_length": 512},
            gguf_files.tensors("Q4_0", vocab=420),
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
