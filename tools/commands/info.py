"""`trimtab info`: what a model is, what it takes to hold, and what of it this machine cannot."""

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
    """MODEL and --json."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="'demo', a folder with config.json, a .gguf file, or a built-in shape such as llama-3.1-8b",
    )
    parser.add_argument("--json", action="store_true", help="print one line of JSON")


def run(args: argparse.Namespace) -> int:
    """Reads headers only: no weight is loaded."""
    with progress(f"trimtab: finding {args.model} …") as report:
        facts = describe(args.model, report)
    print(dumps(facts) if args.json else table(facts))
    return 0


def describe(model: str, report: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """The facts about a model, which needs neither weights nor tokenizer.

    weight_bytes is what its files hold, or would; memory_bytes what the weights take once they are loaded.
    The KV cache has the type of the weights. does_not_fit holds a sentence for each thing.
    """
    from ...models.loader.presets import find  # noqa: PLC0415 - it brings torch, which --help does not need

    config, folder = find(model, report)
    parameters, stored = _weights(config, folder)
    kind, template = _text(folder)
    windows = [window for window in config.windows if window is not None]
    facts = {
        "folder": None if folder is None else str(folder),
        "architecture": config.architecture,
        "parameters": parameters,
        "layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "heads": config.num_heads,
        "kv_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "context": config.context,
        "rope": {"kind": config.rope.kind, "theta": config.rope.theta, "factor": config.rope.factor},
        "sliding_window": max(windows, default=None),
        "sliding_layers": len(windows),
        "dtype": config.dtype,
        "weight_bytes": stored,
        "kv_bytes_per_token": config.kv_size * bits(config.dtype) // 8,
        "kv_bytes_per_branch": config.context * config.kv_size * bits(config.dtype) // 8,
        "vocabulary": config.vocab_size,
        "tokenizer": kind,
        "chat_template": template,
    }
    return facts | _fit(config, facts)


def table(facts: dict[str, Any]) -> str:
    """The facts as lines for people."""
    token, branch = size(facts["kv_bytes_per_token"]), size(facts["kv_bytes_per_branch"])
    rope, window = facts["rope"], facts["sliding_window"]
    scaled = f", factor {rope['factor']:g}" if rope["factor"] != 1 else ""
    slides = f"{facts['sliding_layers']} of {facts['layers']}"
    rows = {
        "folder": facts["folder"] or "none, a built-in shape",
        "architecture": facts["architecture"],
        "parameters": f"{facts['parameters']:,}",
        "layers": facts["layers"],
        "hidden size": facts["hidden_size"],
        "heads": f"{facts['heads']} of {facts['head_dim']}, {facts['kv_heads']} for keys and values",
        "context": f"{facts['context']:,} tokens",
        "rope": f"{rope['kind']}, theta {rope['theta']:g}{scaled}",
        "attention": f"a window of {window:,} tokens in {slides} layers"
        if window
        else "to all tokens before",
        "dtype": facts["dtype"],
        "weights": f"{size(facts['weight_bytes'])}, {size(facts['memory_bytes'])} in memory",
        "KV cache": f"{token} a token and branch, {branch} a branch of the whole context",
        "vocabulary": f"{facts['vocabulary']:,}",
        "tokenizer": facts["tokenizer"] or "none",
        "chat template": facts["chat_template"] or "none",
        "free memory": size(facts["free_bytes"]),
    }
    lines = [*rows.items(), *(("does not fit", sentence) for sentence in facts["does_not_fit"])]
    return "\n".join(f"{name:<14} {terminal.safe(str(value))}" for name, value in lines)


def size(count: int) -> str:
    """`1536` → `1.5 KiB`."""
    power = min(int(math.log(count, 1024)), len(UNITS) - 1) if count else 0
    return f"{count / 1024**power:.3g} {UNITS[power]}"


def bits(dtype: str) -> int:
    """The width of a number of this type, by safetensors' name or torch's: BF16 and bfloat16 → 16."""
    found = re.search(r"\d+", dtype)
    return int(found.group()) if found else 8


def _weights(config: ModelConfig, folder: Path | None) -> tuple[int, int]:
    """Parameters and bytes, of the checkpoint, or where there is none as the config would have it."""
    from ...models import llama  # noqa: PLC0415
    from ...models.weights import safetensors  # noqa: PLC0415

    if folder is not None and any(
        (folder / name).exists() for name in (safetensors.INDEX, safetensors.SINGLE)
    ):
        found = safetensors.Checkpoint(folder)
        shapes, dtypes = found.shapes, found.dtypes
    else:
        shapes = llama.shapes(config)
        dtypes = dict.fromkeys(shapes, config.dtype)
    sizes = {name: math.prod(shape) for name, shape in shapes.items()}
    return sum(sizes.values()), sum(count * bits(dtypes[name]) // 8 for name, count in sizes.items())


def _text(folder: Path | None) -> tuple[str | None, str | None]:
    """The kind of tokenizer, such as BPE, and the file that the chat template is in."""
    from ...models.chat.template import ChatTemplate  # noqa: PLC0415
    from ...models.loader.loader import TOKENIZERS  # noqa: PLC0415
    from ...models.tokenizer.tokenizer import Tokenizer  # noqa: PLC0415

    if folder is None or not any((folder / name).is_file() for name in TOKENIZERS):
        return None, None
    tokenizer = Tokenizer.from_folder(folder)
    if ChatTemplate.from_folder(folder, tokenizer) is None:
        return tokenizer.kind, None
    own = folder / "chat_template.jinja"
    return tokenizer.kind, own.name if own.is_file() else "tokenizer_config.json"


def _fit(config: ModelConfig, facts: dict[str, Any]) -> dict[str, Any]:
    """What the model takes on this machine, what is free, and what is too much."""
    from torch import device  # noqa: PLC0415

    from ...engine.config import EngineConfig, parse_bytes  # noqa: PLC0415
    from ...models.common import memory  # noqa: PLC0415
    from ...models.llama import held_bytes  # noqa: PLC0415

    place = device("cpu")
    held, free = held_bytes(config, bits(config.dtype) // 8, place), memory.free_memory(place)
    branch, cache = facts["kv_bytes_per_branch"], parse_bytes(EngineConfig().kv_cache_memory)
    tokens = cache // facts["kv_bytes_per_token"]
    too_much = {
        f"the weights: they take {size(held)}": held > free,
        f"the weights and a branch of the whole context: {size(held + branch)}": held <= free < held + branch,
        f"a branch of the whole context in the default kv_cache_memory of {size(cache)}: "
        f"{tokens:,} tokens do": branch > cache,
    }
    return {
        "memory_bytes": held,
        "free_bytes": free,
        "does_not_fit": [sentence for sentence, applies in too_much.items() if applies],
    }
