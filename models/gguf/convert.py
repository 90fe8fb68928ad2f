"""Convert a GGUF file to a Hugging Face model folder."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from ...kernels.common.errors import InputError
from ..common.atomic_folder import atomic_folder, require_empty
from ..weights.safetensors import DTYPES, is_finite, warn_non_finite
from .config import GGUFModel, parse_config
from .reader import GGUFFile
from .tokenizer import build_generation_config, build_tokenizer, build_tokenizer_config

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from .config import TensorMapping

Progress = Callable[[int, int], None]
"""Progress callback: bytes done, total bytes."""

SAFETENSORS_DTYPES = {name: code for code, name in DTYPES.items()}
"""Output dtypes, with safetensors' names of them."""
CHUNK_ELEMENTS = 1 << 20
"""Values dequantised at a time: 4 MiB in float32, which fits a CPU's caches."""


def convert(path: Path, folder: Path, dtype: str = "bfloat16", progress: Progress | None = None) -> Path:
    """Write the GGUF file `path` as a Hugging Face folder and return that folder.

    Weights are dequantised by the `gguf` package and rounded to nearest even in `dtype` ("float32",
    "bfloat16" or "float16"), a chunk of rows at a time. `folder` is written atomically.
    Raises InputError for an unsupported file or a folder that is not empty; RunError without the `gguf`
    package or when the folder cannot be written.
    """
    if dtype not in SAFETENSORS_DTYPES:
        raise InputError(f"dtype is {dtype!r}; it must be one of {', '.join(SAFETENSORS_DTYPES)}")
    require_empty(folder)
    file = GGUFFile(path)
    model = GGUFModel(file)
    config = model.build_config(dtype)
    tensor_map, hf_tokenizer = model.build_tensor_map(config), build_tokenizer(file)
    parse_config(config)
    template = file.get_str("tokenizer.chat_template")
    with atomic_folder(folder) as staging:
        staging.mkdir()
        (staging / "tokenizer.json").write_text(hf_tokenizer.to_str(pretty=True), encoding="utf-8")
        _write_json(
            staging / "tokenizer_config.json", build_tokenizer_config(file, config["max_position_embeddings"])
        )
        if template:
            (staging / "chat_template.jinja").write_text(template, encoding="utf-8")
        _write_json(staging / "generation_config.json", build_generation_config(file))
        _write_weights(staging / "model.safetensors", file, tensor_map, dtype, progress)
        _write_json(staging / "config.json", config)
    return folder


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_weights(
    path: Path,
    reader: GGUFFile,
    tensor_map: Mapping[str, TensorMapping],
    dtype: str,
    progress: Progress | None,
) -> None:
    """Write a safetensors file chunk by chunk."""
    torch_dtype: torch.dtype = getattr(torch, dtype)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    total = 0
    for name, mapping in tensor_map.items():
        end = total + math.prod(mapping.shape) * torch_dtype.itemsize
        header[name] = {
            "dtype": SAFETENSORS_DTYPES[dtype],
            "shape": mapping.shape,
            "data_offsets": (total, end),
        }
        total = end
    header_bytes = json.dumps(header, separators=(",", ":")).encode()
    header_bytes += b" " * (-len(header_bytes) % 8)  # aligns the data that follow
    done = 0
    with path.open("wb") as output:
        output.write(len(header_bytes).to_bytes(8, "little") + header_bytes)
        for mapping in tensor_map.values():
            for chunk in _iter_chunks(reader, mapping):
                rounded = _round_to_dtype(chunk, torch_dtype, mapping.gguf_name)
                output.write(rounded.view(torch.uint8).numpy().data)
                done += rounded.nbytes
                if progress:
                    progress(done, total)


def _iter_chunks(reader: GGUFFile, mapping: TensorMapping) -> Iterator[torch.Tensor]:
    """Yield the rows of a tensor in float32 and Hugging Face's order, in chunks that do not split heads."""
    tensor, chunk_rows = reader.tensors[mapping.gguf_name], max(1, CHUNK_ELEMENTS // mapping.shape[-1])
    if mapping.permuted_head_dim:
        chunk_rows = max(1, chunk_rows // mapping.permuted_head_dim) * mapping.permuted_head_dim
    for start in range(0, len(tensor.data), chunk_rows):
        rows = tensor.dequantize_rows(start, start + chunk_rows)
        yield _unpermute_rope(rows, mapping.permuted_head_dim) if mapping.permuted_head_dim else rows


def _unpermute_rope(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Undo llama.cpp's permutation of query and key rows.

    Rotary embedding pairs rows of a head: 2i and 2i + 1 in llama.cpp, i and i + head_dim / 2 here.
    """
    pairs = rows.view(-1, head_dim // 2, 2, rows.shape[1])  # [heads, head_dim / 2, 2, hidden]
    return pairs.transpose(1, 2).reshape(rows.shape)


def _round_to_dtype(values: torch.Tensor, dtype: torch.dtype, name: str) -> torch.Tensor:
    rounded = values.to(dtype)
    if not is_finite(rounded):
        if (rounded.isfinite() != values.isfinite()).any():
            dtype_name = str(dtype).removeprefix("torch.")
            raise InputError(
                f"tensor {name!r} has values that are not finite in {dtype_name}; try dtype float32"
            )
        warn_non_finite(name)
    return rounded
