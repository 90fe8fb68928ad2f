"""A command of the command line: a module that adds its flags and runs, found by its name."""

from __future__ import annotations

import argparse
import importlib
from typing import TYPE_CHECKING, Protocol, cast

from ...kernels.common.errors import InputError
from .parser import Parser

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


class Verb(Protocol):
    """What each such module has."""

    def add_arguments(self, parser: Parser) -> None: ...

    def run(self, args: argparse.Namespace) -> int: ...


def run(module: str, command: str, text: str, argv: Sequence[str]) -> int:
    """Has the module do what is asked of `command`, such as "trimtab info", and gives the exit status.

    text: what it does, which begins its help. Raises InputError for what its parser refuses.
    """
    verb = cast("Verb", importlib.import_module(module))
    parser = Parser(command, f"{text[0].upper()}{text[1:]}.")
    verb.add_arguments(parser)
    try:
        args = parser.read(argv)
    except SystemExit:  # argparse has printed the help
        return 0
    return verb.run(args)


def add_kind(parser: Parser, kind: str, known: Mapping[str, str]) -> None:
    """KIND, one of `known` with what it does, and whatever follows: each has flags of its own."""
    told = "; ".join(f"{name}: {text}" for name, text in known.items())
    parser.add_argument("kind", metavar=kind.upper(), nargs="?", help=told)
    more = f"see {parser.prog} {kind.upper()} --help"
    parser.add_argument("rest", metavar="...", nargs=argparse.REMAINDER, help=more)


def run_kind(
    package: str, command: str, kind: str, plural: str, known: Mapping[str, str], args: argparse.Namespace
) -> int:
    """Runs what was named, a module of `package`. Raises InputError where it is none of those."""
    if args.kind is None:
        raise InputError(f"there is no {kind.upper()}; say what to measure: {', '.join(known)}")
    if args.kind not in known:
        raise InputError(f"there is no {kind} {args.kind!r}; {plural} are {', '.join(known)}")
    return run(f"{package}.{args.kind}", f"{command} {args.kind}", known[args.kind], args.rest)
