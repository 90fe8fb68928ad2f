"""GGUF files: a model in llama.cpp's format becomes an ordinary Hugging Face folder."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ...kernels.common.errors import InputError
from ..common.atomic_folder import arriving, refuse_occupied
from ..config import ModelConfig
from ..weights.safetensors import DTYPES, is_finite, warn_of_infinity
from .config import Decoder
from .reader import GGUFFile
from .tokenizer import generation_config, tokenizer, tokenizer_config

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from .config import Part

Progress = Callable[[int, int], None]
"""Told how far a long step is: bytes done, bytes in all."""

CODES = {name: code for code, name in DTYPES.items()}
"""safetensors' names of the types that a folder may be written in."""
SLAB = 1 << 20
"""Numbers that are dequantised at a time: few enough for the caches of a CPU, 4 MiB in float32."""


def convert(path: Path, folder: Path, dtype: str = "bfloat16", progress: Progress | None = None) -> Path:
    """Writes the GGUF file `path` as a Hugging Face folder and returns that folder.

    Weights are dequantised by the `gguf` package and rounded to nearest even in `dtype` ("float32",
    "bfloat16" or "float16"), some rows of a tensor in memory at a time. `folder` appears whole or not at all.
    Raises InputError for a file that is no such model, or a folder that is there and not empty; RunError
    without the `gguf` package or when the folder cannot be written.
    """
    if dtype not in CODES:
        raise InputError(f"dtype is {dtype!r}; it must be one of {', '.join(CODES)}")
    refuse_occupied(folder)
    file = GGUFFile(path)
    decoder = Decoder(file)
    config, plan, backend = decoder.config(dtype), decoder.plan(), tokenizer(file)
    try:
        ModelConfig.from_dict(config)
    except InputError as error:
        raise InputError(f"the GGUF file's metadata make no model: {error}") from None
    template = file.text("tokenizer.chat_template")
    with arriving(folder) as part:
        part.mkdir()
        (part / "tokenizer.json").write_text(backend.to_str(pretty=True), encoding="utf-8")
        _write_json(part / "tokenizer_config.json", tokenizer_config(file, config["max_position_embeddings"]))
        if template:
            (part / "chat_template.jinja").write_text(template, encoding="utf-8")
        _write_json(part / "generation_config.json", generation_config(file))
        _write_weights(part / "model.safetensors", file, plan, dtype, progress)
        _write_json(part / "config.json", config)
    return folder


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_weights(
    path: Path, source: GGUFFile, plan: Mapping[str, Part], dtype: str, progress: Progress | None
) -> None:
    """Writes a safetensors file slab by slab."""
    kind: torch.dtype = getattr(torch, dtype)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    total = 0
    for target, part in plan.items():
        end = total + math.prod(part.shape) * kind.itemsize
        header[target] = {"dtype": CODES[dtype], "shape": part.shape, "data_offsets": (total, end)}
        total = end
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)  # the data that follow are aligned
    done = 0
    with path.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for part in plan.values():
            for slab in _slabs(source, part):
                rounded = _rounded(slab, kind, part.source)
                file.write(rounded.view(torch.uint8).numpy().data)
                done += rounded.nbytes
                if progress:
                    progress(done, total)


def _slabs(file: GGUFFile, part: Part) -> Iterator[torch.Tensor]:
    """The rows of a tensor in float32 and in Hugging Face's order, whole heads at a time."""
    stored, step = file.tensors[part.source], max(1, SLAB // part.shape[-1])
    if part.width:
        step = max(1, step // part.width) * part.width
    for start in range(0, len(stored.data), step):
        rows = stored.rows(start, start + step)
        yield _halves_from_pairs(rows, part.width) if part.width else rows


def _halves_from_pairs(rows: torch.Tensor, width: int) -> torch.Tensor:
    """Undoes llama.cpp's order of query and key rows.

    Rotary embedding turns pairs of a head's rows: 2i and 2i + 1 in llama.cpp, i and i + width / 2 here.
    """
    pairs = rows.view(-1, width // 2, 2, rows.shape[1])  # [heads, width / 2, 2, hidden]
    return pairs.transpose(1, 2).reshape(rows.shape)


def _rounded(values: torch.Tensor, kind: torch.dtype, name: str) -> torch.Tensor:
    rounded = values.to(kind)
    if not is_finite(rounded):
        if (rounded.isfinite() != values.isfinite()).any():
            dtype = str(kind).removeprefix("torch.")
            raise InputError(f"tensor {name!r} has values that are no finite {dtype}; try dtype float32")
        warn_of_infinity(name)
    return rounded
