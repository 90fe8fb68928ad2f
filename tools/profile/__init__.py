"""`trimtab profile`: resources of the compiled kernels, and the time of a decoding step by stage."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..cli import command

if TYPE_CHECKING:
    import argparse

    from ..cli.parser import Parser

SUBJECTS = {
    "kernels": "registers, shared memory, spills and minimum times of the Triton kernels, from compiled code",
    "decode": "time of a decoding step by stage",
}


def add_arguments(parser: Parser) -> None:
    """Add SUBJECT and the arguments after it."""
    command.add_subcommand(parser, "subject", SUBJECTS)


def run(args: argparse.Namespace) -> int:
    """Profile one subject. Raises InputError for an unknown name."""
    return command.run_subcommand(__package__ or "", "trimtab profile", "subject", "subjects", SUBJECTS, args)
