"""`trimtab convert`: convert a GGUF file to a Hugging Face model folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..cli import flags
from ..cli.display import progress

if TYPE_CHECKING:
    import argparse

    from ..cli.parser import Parser

DTYPES = ("bfloat16", "float32", "float16")


def add_arguments(parser: Parser) -> None:
    """Add FILE.gguf, FOLDER and --dtype."""
    parser.add_argument(
        "file",
        metavar="FILE.gguf",
        type=Path,
        help="a Llama, Mistral, Qwen2 or Qwen3 model, quantised or not",
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path, help="the output folder: new or empty")
    parser.add_argument(
        "--dtype",
        default=DTYPES[0],
        metavar=flags.format_choices(DTYPES),
        help="dtype of the written weights; float32 is lossless (default: %(default)s)",
    )


def run(args: argparse.Namespace) -> int:
    """Convert the file and print the model folder."""
    with progress(f"trimtab: converting {args.file.name} …") as on_progress:
        from ...models.gguf.convert import convert  # noqa: PLC0415 - imports torch, which --help does not need

        folder = convert(args.file, args.folder, dtype=args.dtype, progress=on_progress)
    print(folder)
    return 0
