"""`trimtab pull`: download a model that trimtab knows by name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...kernels.common.errors import InputError
from ..cli.display import progress

if TYPE_CHECKING:
    import argparse

    from ..cli.parser import Parser


def add_arguments(parser: Parser) -> None:
    """NAME."""
    parser.add_argument(
        "name", metavar="NAME", help="demo: SmolLM2-135M-Instruct, a small chat model (Apache-2.0)"
    )


def run(args: argparse.Namespace) -> int:
    """Prints the folder of the model."""
    if args.name != "demo":
        raise InputError(f"unknown model {args.name!r} to pull; only 'demo' is known")
    with progress("trimtab: pulling demo …") as on_progress:
        from ...models.loader.download import pull_demo  # noqa: PLC0415 - it brings torch, which --help does not need

        folder = pull_demo(progress=on_progress)
    print(folder)
    return 0
