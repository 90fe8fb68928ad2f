"""`trimtab bench`: how fast it is, beside the machine, beside peers and beside another commit."""

from __future__ import annotations

import argparse
import importlib
from typing import TYPE_CHECKING, Protocol, cast

from ...kernels.errors import InputError
from ..flags import Parser

if TYPE_CHECKING:
    from collections.abc import Sequence

BENCHES = {
    "latency": "one batch: first token, a step, and how near it comes to the memory's speed",
    "throughput": "many requests at once, and one after another",
    "serve": "a running OpenAI-compatible server, over HTTP",
    "peers": "the same prompts on transformers, vLLM, llama.cpp and a literal Amulet",
    "compare": "this commit beside another; fails when it is slower",
}


class Bench(Protocol):
    """What each bench's module has."""

    def add_arguments(self, parser: Parser) -> None: ...

    def run(self, args: argparse.Namespace) -> int: ...


def add_arguments(parser: Parser) -> None:
    """BENCH, and whatever follows: each bench has flags of its own."""
    known = "; ".join(f"{name}: {text}" for name, text in BENCHES.items())
    parser.add_argument("bench", metavar="BENCH", nargs="?", help=known)
    parser.add_argument(
        "rest", metavar="...", nargs=argparse.REMAINDER, help="see trimtab bench BENCH --help"
    )
    parser.epilog = "The last line that a bench prints is JSON: settings, machine, commit and every value."


def run(args: argparse.Namespace) -> int:
    """Runs one bench. Raises InputError for one that there is not."""
    if args.bench is None:
        raise InputError(f"there is no BENCH; say what to measure: {', '.join(BENCHES)}")
    return _run(args.bench, args.rest)


def _run(name: str, rest: Sequence[str]) -> int:
    if name not in BENCHES:
        raise InputError(f"there is no bench {name!r}; benches are {', '.join(BENCHES)}")
    bench = cast("Bench", importlib.import_module(f".{name}", __package__))
    parser = Parser(f"trimtab bench {name}", f"{BENCHES[name][0].upper()}{BENCHES[name][1:]}.")
    bench.add_arguments(parser)
    try:
        asked = parser.read(rest)
    except SystemExit:  # argparse has printed the help
        return 0
    return bench.run(asked)
