"""`trimtab bench`: how fast it is, beside the machine, beside peers and beside another commit."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from ...kernels.errors import InputError
from .. import verb

if TYPE_CHECKING:
    from ..flags import Parser

BENCHES = {
    "latency": "one batch: first token, a step, and how near it comes to the memory's speed",
    "throughput": "many requests at once, and one after another",
    "serve": "a running OpenAI-compatible server, over HTTP",
    "peers": "the same prompts on transformers, vLLM, llama.cpp and a literal Amulet",
    "compare": "this commit beside another; fails when it is slower",
}


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
    if args.bench not in BENCHES:
        raise InputError(f"there is no bench {args.bench!r}; benches are {', '.join(BENCHES)}")
    module, command = f"{__package__}.{args.bench}", f"trimtab bench {args.bench}"
    return verb.run(module, command, BENCHES[args.bench], args.rest)
