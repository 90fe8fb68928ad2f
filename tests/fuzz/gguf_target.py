"""Fuzz target for GGUF files: convert a damaged file and run the resulting model folder."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING, Any

from sentencepiece import SentencePieceProcessor

from ..helpers import gguf_files, vocabularies
from .binary_formats import damage_gguf
from .model_folders import use_model
from .target import FuzzTarget

if TYPE_CHECKING:
    from pathlib import Path


def gguf_target(folder: Path) -> FuzzTarget:
    os.environ["TRIMTAB_CACHE"] = str(folder / "cache")
    damaged_file = folder / "damaged.gguf"
    yarn_metadata = {
        "llama.context_length": 512,
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 4.0,
    }
    files = [
        gguf_files.write_gguf(folder / "a.gguf", yarn_metadata, gguf_files.random_tensors("F16")),
        gguf_files.write_gguf(
            folder / "b.gguf",
            {"qwen2.context_length": 512},
            gguf_files.random_tensors("Q8_0", "qwen2"),
            "qwen2",
        ),
        gguf_files.write_gguf(
            folder / "c.gguf",
            {**_sentencepiece_metadata(), "llama.context_length": 512},
            gguf_files.random_tensors("Q4_0", vocab=420),
        ),
    ]

    def run(seed: int, data: bytes) -> None:
        shutil.rmtree(folder / "cache", ignore_errors=True)
        damaged_file.write_bytes(data)
        use_model(damaged_file)

    return FuzzTarget([file.read_bytes() for file in files], damage_gguf, run)


def _sentencepiece_metadata() -> dict[str, Any]:
    """GGUF tokenizer metadata of a SentencePiece vocabulary."""
    model = SentencePieceProcessor(model_proto=vocabularies.sentencepiece_model(**vocabularies.LLAMA_OPTIONS))
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
