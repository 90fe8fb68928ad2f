"""`trimtab info`: what a model is, and what it takes to hold."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

from . import plain
from .display import progress

if TYPE_CHECKING:
    import argparse
    from pathlib import Path

    from .flags import Parser

KV_DTYPE = "float32"
"""What the KV cache of a CPU holds, whatever the weights' type."""

UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


def add_arguments(parser: Parser) -> None:
    """MODEL and --json."""
    parser.add_argument(
        "model", metavar="MODEL", help="'demo', a folder with config.json and safetensors, or a .gguf file"
    )
    parser.add_argument("--json", action="store_true", help="print one line of JSON")


def run(args: argparse.Namespace) -> int:
    """Reads headers only: no weight is loaded."""
    with progress(f"trimtab: finding {args.model} …") as report:
        from ..models.source import resolve  # noqa: PLC0415 - it brings torch, which --help does not need

        folder = resolve(args.model, progress=report)
    facts = describe(folder)
    print(plain.json_line(facts) if args.json else table(facts))
    return 0


def describe(folder: Path) -> dict[str, Any]:
    """The facts about a model folder. Weights are counted as stored, the KV cache as the CPU keeps it."""
    from ..models.checkpoint import Checkpoint  # noqa: PLC0415
    from ..models.config import ModelConfig  # noqa: PLC0415

    config, checkpoint = ModelConfig.from_folder(folder), Checkpoint(folder)
    sizes = {name: math.prod(shape) for name, shape in checkpoint.shapes.items()}
    kind, has_template = _tokenizer(folder)
    return {
        "folder": str(folder),
        "architecture": config.architecture,
        "parameters": sum(sizes.values()),
        "layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "context": config.max_position_embeddings,
        "dtype": config.dtype,
        "weight_bytes": sum(size * bits(checkpoint.dtypes[name]) // 8 for name, size in sizes.items()),
        "kv_bytes_per_token": config.kv_size * bits(KV_DTYPE) // 8,
        "vocabulary": config.vocab_size,
        "tokenizer": kind,
        "chat_template": has_template,
    }


def table(facts: dict[str, Any]) -> str:
    """The facts as lines for people."""
    per_branch = size(facts["kv_bytes_per_token"])
    rows = {
        "folder": facts["folder"],
        "architecture": facts["architecture"],
        "parameters": f"{facts['parameters']:,}",
        "layers": facts["layers"],
        "hidden size": facts["hidden_size"],
        "heads": f"{facts['heads']} of {facts['head_dim']}, {facts['kv_heads']} for keys and values",
        "context": f"{facts['context']:,} tokens",
        "dtype": facts["dtype"],
        "weights": size(facts["weight_bytes"]),
        "KV cache": f"{per_branch} a token and branch, in {KV_DTYPE}",
        "vocabulary": f"{facts['vocabulary']:,}",
        "tokenizer": facts["tokenizer"] or "none",
        "chat template": "yes" if facts["chat_template"] else "no",
    }
    return "\n".join(f"{name:<14} {plain.safe(str(value))}" for name, value in rows.items())


def size(count: int) -> str:
    """`1536` → `1.5 KiB`."""
    power = min(int(math.log(count, 1024)), len(UNITS) - 1) if count else 0
    return f"{count / 1024**power:.3g} {UNITS[power]}"


def bits(dtype: str) -> int:
    """The width of a number of this type, by safetensors' name or torch's: BF16 and bfloat16 → 16."""
    found = re.search(r"\d+", dtype)
    return int(found.group()) if found else 8


def _tokenizer(folder: Path) -> tuple[str | None, bool]:
    """The kind of tokenizer, such as BPE, and whether the model brings a chat template."""
    from ..models.chat import ChatTemplate  # noqa: PLC0415
    from ..models.tokenizer import Tokenizer, read_json  # noqa: PLC0415

    if not (folder / "tokenizer.json").is_file():
        return None, False
    tokenizer = Tokenizer.from_folder(folder)
    kind = str(read_json(folder / "tokenizer.json").get("model", {}).get("type", "unknown"))
    return kind, ChatTemplate.from_folder(folder, tokenizer) is not None
