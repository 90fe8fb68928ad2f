"""A command of the command line: a module that adds its flags and runs, found by its name."""

from __future__ import annotations

import argparse
import importlib
from typing import TYPE_CHECKING, Protocol, cast

from ...kernels.common.errors import InputError
from .parser import Parser

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class Command(Protocol):
    """What each such module has."""

    def add_arguments(self, parser: Parser) -> None: ...

    def run(self, args: argparse.Namespace) -> int: ...


def run(module: str, prog: str, description: str, argv: Sequence[str]) -> int:
    """Has the module do what is asked of `prog`, such as "trimtab info", and gives the exit status.

    description: what it does, which begins its help. Raises InputError for what its parser refuses.
    """
    command = cast("Command", importlib.import_module(module))
    parser = Parser(prog, f"{description[0].upper()}{description[1:]}.")
    command.add_arguments(parser)
    try:
        args = parser.parse_argv(argv)
    except SystemExit:  # argparse has printed the help
        return 0
    return command.run(args)


def add_subcommand(parser: Parser, kind: str, subcommands: Mapping[str, str]) -> None:
    """KIND, one of `subcommands` with what it does, and whatever follows: each has flags of its own."""
    help_text = "; ".join(f"{name}: {text}" for name, text in subcommands.items())
    parser.add_argument("kind", metavar=kind.upper(), nargs="?", help=help_text)
    rest_help = f"see {parser.prog} {kind.upper()} --help"
    parser.add_argument("rest", metavar="...", nargs=argparse.REMAINDER, help=rest_help)


def run_subcommand(
    package: str, prog: str, kind: str, plural: str, subcommands: Mapping[str, str], args: argparse.Namespace
) -> int:
    """Runs what was named, a module of `package`. Raises InputError where it is none of those."""
    if args.kind is None:
        raise InputError(f"there is no {kind.upper()}; say what to measure: {', '.join(subcommands)}")
    if args.kind not in subcommands:
        raise InputError(f"unknown {kind} {args.kind!r}; {plural} are {', '.join(subcommands)}")
    return run(f"{package}.{args.kind}", f"{prog} {args.kind}", subcommands[args.kind], args.rest)
