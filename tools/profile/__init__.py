"""`trimtab profile`: what kernels take of a GPU, and where a decoding step's time goes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..cli import command

if TYPE_CHECKING:
    import argparse

    from ..cli.parser import Parser

SUBJECTS = {
    "kernels": "registers, shared memory, spills and floors of the Triton kernels, from their compiled code",
    "decode": "where a decoding step's time goes, stage by stage",
}


def add_arguments(parser: Parser) -> None:
    """SUBJECT, and whatever follows."""
    command.add_subcommand(parser, "subject", SUBJECTS)


def run(args: argparse.Namespace) -> int:
    """Profiles one subject. Raises InputError for one that there is not."""
    return command.run_subcommand(__package__ or "", "trimtab profile", "subject", "subjects", SUBJECTS, args)
