"""`trimtab info`: a model's architecture and size, and whether it fits into this machine's memory."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

from ...engine.utils.json import dumps
from ..cli import terminal
from ..cli.display import progress

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable
    from pathlib import Path

    from ...models.config import ModelConfig
    from ..cli.parser import Parser

UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


def add_arguments(parser: Parser) -> None:
    """Add MODEL and --json."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="'demo', a folder with config.json, a .gguf file, or a built-in shape such as llama-3.1-8b",
    )
    parser.add_argument("--json", action="store_true", help="print one line of JSON")


def run(args: argparse.Namespace) -> int:
    """Print the model's data. Only file headers are read; no weights are loaded."""
    with progress(f"trimtab: finding {args.model} …") as on_progress:
        info = model_info(args.model, on_progress)
    print(dumps(info) if args.json else format_table(info))
    return 0


def model_info(model: str, on_progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """The model's data as a dictionary; neither weights nor a tokenizer are required.

    weight_bytes is the size of the weights on disk, computed from the config if there are no weight files;
    memory_bytes their size once loaded. The KV cache is assumed to have the dtype of the weights.
    does_not_fit has one message for each part that does not fit into memory.
    """
    from ...models.loader.presets import resolve_config  # noqa: PLC0415 - imports torch, which --help does not need

    config, folder = resolve_config(model, on_progress)
    parameters, weight_bytes = _count_weights(config, folder)
    tokenizer_kind, template = _text_files(folder)
    windows = [window for window in config.sliding_windows if window is not None]
    info = {
        "folder": None if folder is None else str(folder),
        "architecture": config.architecture,
        "parameters": parameters,
        "layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "context": config.context_length,
        "rope": {"kind": config.rope.rope_type, "theta": config.rope.theta, "factor": config.rope.factor},
        "sliding_window": max(windows, default=None),
        "sliding_layers": len(windows),
        "dtype": config.dtype,
        "weight_bytes": weight_bytes,
        "kv_bytes_per_token": config.kv_elements_per_token * dtype_bits(config.dtype) // 8,
        "kv_bytes_per_branch": config.context_length
        * config.kv_elements_per_token
        * dtype_bits(config.dtype)
        // 8,
        "vocabulary": config.vocab_size,
        "tokenizer": tokenizer_kind,
        "chat_template": template,
    }
    return info | _memory_fit(config, info)


def format_table(info: dict[str, Any]) -> str:
    """The facts as lines for people."""
    token_bytes, branch_bytes = (
        format_bytes(info["kv_bytes_per_token"]),
        format_bytes(info["kv_bytes_per_branch"]),
    )
    rope, window = info["rope"], info["sliding_window"]
    rope_factor = f", factor {rope['factor']:g}" if rope["factor"] != 1 else ""
    sliding = f"{info['sliding_layers']} of {info['layers']}"
    rows = {
        "folder": info["folder"] or "none, a built-in shape",
        "architecture": info["architecture"],
        "parameters": f"{info['parameters']:,}",
        "layers": info["layers"],
        "hidden size": info["hidden_size"],
        "heads": f"{info['heads']} of {info['head_dim']}, {info['kv_heads']} for keys and values",
        "context": f"{info['context']:,} tokens",
        "rope": f"{rope['kind']}, theta {rope['theta']:g}{rope_factor}",
        "attention": f"a window of {window:,} tokens in {sliding} layers"
        if window
        else "to all previous tokens",
        "dtype": info["dtype"],
        "weights": f"{format_bytes(info['weight_bytes'])}, {format_bytes(info['memory_bytes'])} in memory",
        "KV cache": f"{token_bytes} per token and branch, {branch_bytes} per branch of the full context",
        "vocabulary": f"{info['vocabulary']:,}",
        "tokenizer": info["tokenizer"] or "none",
        "chat template": info["chat_template"] or "none",
        "free memory": format_bytes(info["free_bytes"]),
    }
    lines = [*rows.items(), *(("does not fit", message) for message in info["does_not_fit"])]
    return "\n".join(f"{name:<14} {terminal.escape(str(value))}" for name, value in lines)


def format_bytes(num_bytes: int) -> str:
    """`1536` → `1.5 KiB`."""
    power = min(int(math.log(num_bytes, 1024)), len(UNITS) - 1) if num_bytes else 0
    return f"{num_bytes / 1024**power:.3g} {UNITS[power]}"


def dtype_bits(dtype: str) -> int:
    """Bits per element of a dtype in safetensors' or torch's naming: BF16 and bfloat16 → 16."""
    match = re.search(r"\d+", dtype)
    return int(match.group()) if match else 8


def _count_weights(config: ModelConfig, folder: Path | None) -> tuple[int, int]:
    """Parameters and bytes of the checkpoint; without weight files, those that the config implies."""
    from ...models import decoder  # noqa: PLC0415
    from ...models.weights import safetensors  # noqa: PLC0415

    if folder is not None and any(
        (folder / name).exists() for name in (safetensors.INDEX_FILE, safetensors.SINGLE_FILE)
    ):
        weights = safetensors.Checkpoint(folder)
        shapes, dtypes = weights.shapes, weights.dtypes
    else:
        shapes = decoder.param_shapes(config)
        dtypes = dict.fromkeys(shapes, config.dtype)
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    return sum(sizes.values()), sum(count * dtype_bits(dtypes[name]) // 8 for name, count in sizes.items())


def _text_files(folder: Path | None) -> tuple[str | None, str | None]:
    """The tokenizer kind, such as BPE, and the name of the file with the chat template; None if missing."""
    from ...models.chat.template import ChatTemplate  # noqa: PLC0415
    from ...models.loader.loader import TOKENIZER_FILES  # noqa: PLC0415
    from ...models.tokenizer.tokenizer import Tokenizer  # noqa: PLC0415

    if folder is None or not any((folder / name).is_file() for name in TOKENIZER_FILES):
        return None, None
    tokenizer = Tokenizer.from_folder(folder)
    if ChatTemplate.from_folder(folder, tokenizer) is None:
        return tokenizer.kind, None
    template_file = folder / "chat_template.jinja"
    return tokenizer.kind, template_file.name if template_file.is_file() else "tokenizer_config.json"


def _memory_fit(config: ModelConfig, info: dict[str, Any]) -> dict[str, Any]:
    """Memory that the model needs on this machine, free memory, and what does not fit."""
    from torch import device  # noqa: PLC0415

    from ...engine.config import EngineConfig, parse_bytes  # noqa: PLC0415
    from ...models.common import memory  # noqa: PLC0415
    from ...models.decoder import weight_bytes  # noqa: PLC0415

    cpu = device("cpu")
    model_bytes = weight_bytes(config, dtype_bits(config.dtype) // 8, cpu)
    free_bytes = memory.free_memory(cpu)
    branch_bytes, cache_bytes = info["kv_bytes_per_branch"], parse_bytes(EngineConfig().kv_cache_memory)
    both_bytes = model_bytes + branch_bytes
    max_tokens = cache_bytes // info["kv_bytes_per_token"]
    problems = {
        f"the weights: {format_bytes(model_bytes)}": model_bytes > free_bytes,
        f"the weights and a branch of the full context: {format_bytes(both_bytes)}": (
            model_bytes <= free_bytes < both_bytes
        ),
        f"a branch of the full context in the default kv_cache_memory of {format_bytes(cache_bytes)}: "
        f"{max_tokens:,} tokens fit": branch_bytes > cache_bytes,
    }
    return {
        "memory_bytes": model_bytes,
        "free_bytes": free_bytes,
        "does_not_fit": [message for message, applies in problems.items() if applies],
    }
