"""Interface of the command modules; run a command or subcommand by name."""

from __future__ import annotations

import argparse
import importlib
from typing import TYPE_CHECKING, Protocol, cast

from ...kernels.common.errors import InputError
from .parser import Parser

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class Command(Protocol):
    """The functions that a command module defines."""

    def add_arguments(self, parser: Parser) -> None: ...

    def run(self, args: argparse.Namespace) -> int: ...


def run(module: str, prog: str, description: str, argv: Sequence[str]) -> int:
    """Run the command module with the arguments `argv` and return the exit status.

    prog: the command as typed, such as "trimtab info". description: what it does, shown first in its help.
    Raises InputError for invalid arguments.
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
    """Add the argument KIND and the rest of the line. `subcommands` maps names to descriptions.

    Each subcommand has flags of its own.
    """
    help_text = "; ".join(f"{name}: {text}" for name, text in subcommands.items())
    parser.add_argument("kind", metavar=kind.upper(), nargs="?", help=help_text)
    rest_help = f"see {parser.prog} {kind.upper()} --help"
    parser.add_argument("rest", metavar="...", nargs=argparse.REMAINDER, help=rest_help)


def run_subcommand(
    package: str, prog: str, kind: str, plural: str, subcommands: Mapping[str, str], args: argparse.Namespace
) -> int:
    """Run the named subcommand, a module of `package`. Raises InputError if it is missing or unknown."""
    if args.kind is None:
        raise InputError(f"{kind.upper()} is missing; it must be one of {', '.join(subcommands)}")
    if args.kind not in subcommands:
        raise InputError(f"unknown {kind} {args.kind!r}; {plural} are {', '.join(subcommands)}")
    return run(f"{package}.{args.kind}", f"{prog} {args.kind}", subcommands[args.kind], args.rest)
