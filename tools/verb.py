"""A command of the command line: a module that adds its flags and runs, found by its name."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Protocol, cast

from .flags import Parser

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence


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
