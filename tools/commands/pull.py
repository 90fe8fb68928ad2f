"""`trimtab pull`: download a model by its name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...kernels.common.errors import InputError
from ..cli.display import progress

if TYPE_CHECKING:
    import argparse

    from ..cli.parser import Parser


def add_arguments(parser: Parser) -> None:
    """Add NAME."""
    parser.add_argument(
        "name", metavar="NAME", help="demo: SmolLM2-135M-Instruct, a small chat model (Apache-2.0)"
    )


def run(args: argparse.Namespace) -> int:
    """Download the model and print its folder."""
    if args.name != "demo":
        raise InputError(f"unknown model {args.name!r} to pull; it must be 'demo'")
    with progress("trimtab: pulling demo …") as on_progress:
        from ...models.loader.download import pull_demo  # noqa: PLC0415 - imports torch, which --help does not need

        folder = pull_demo(progress=on_progress)
    print(folder)
    return 0
