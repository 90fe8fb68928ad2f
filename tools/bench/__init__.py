"""`trimtab bench`: how fast it is, beside the machine, beside peers and beside another commit."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..cli import command

if TYPE_CHECKING:
    import argparse

    from ..cli.parser import Parser

BENCHES = {
    "latency": "one batch: first token, a step, and how near it comes to the memory's speed",
    "throughput": "many requests at once, and one after another",
    "serve": "a running OpenAI-compatible server, over HTTP",
    "overhead": "what serving adds to the engine, and what a crowd does to it; it starts the servers",
    "peers": "the same prompts on transformers, vLLM, llama.cpp and a literal Amulet",
    "compare": "this commit beside another; fails when it is slower",
}


def add_arguments(parser: Parser) -> None:
    """BENCH, and whatever follows."""
    command.add_subcommand(parser, "bench", BENCHES)
    parser.epilog = "The last line that a bench prints is JSON: settings, machine, commit and every value."


def run(args: argparse.Namespace) -> int:
    """Runs one bench. Raises InputError for one that there is not."""
    return command.run_subcommand(__package__ or "", "trimtab bench", "bench", "benches", BENCHES, args)
