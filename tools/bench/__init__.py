"""`trimtab bench`: speed against the machine's peaks, other engines and other commits."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..cli import command

if TYPE_CHECKING:
    import argparse

    from ..cli.parser import Parser

BENCHES = {
    "latency": "one batch: time to first token, step time and share of the memory bandwidth",
    "throughput": "many requests at once, and optionally one after another",
    "serve": "a running OpenAI-compatible server, over HTTP",
    "overhead": "CPU cost of the server over the engine, and behaviour under overload; it starts the servers",
    "peers": "the same prompts on transformers, vLLM, llama.cpp and a literal Amulet loop",
    "compare": "this commit against another; fails when it is slower",
}


def add_arguments(parser: Parser) -> None:
    """Add BENCH and the arguments after it."""
    command.add_subcommand(parser, "bench", BENCHES)
    parser.epilog = "The last line that a bench prints is JSON: settings, machine, commit and every value."


def run(args: argparse.Namespace) -> int:
    """Run one bench. Raises InputError for an unknown name."""
    return command.run_subcommand(__package__ or "", "trimtab bench", "bench", "benches", BENCHES, args)
