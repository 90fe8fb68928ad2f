"""Flags shared by generate, chat and compare, and the configs made from them."""

from __future__ import annotations

import argparse
import sys
from contextlib import contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from ...engine.config import EngineConfig
from ...engine.request import Request
from ...engine.sampling_params import SamplingParams
from ...kernels.common.errors import InputError
from . import flags

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator
    from typing import TextIO

    from .parser import Parser


def add_prompt(parser: Parser, optional: bool = False) -> None:
    """Add PROMPT and --system."""
    help = "the prompt; - reads it from standard input"
    parser.add_argument("prompt", metavar="PROMPT", nargs="?" if optional else None, help=help)
    add_system(parser)


def add_system(parser: Parser) -> None:
    """Add the flag --system."""
    parser.add_argument(
        "--system",
        metavar="TEXT",
        help="system prompt, before the objectives (default: You are a helpful assistant.)",
    )


def add_model(parser: Parser, skip_fields_of: type = SamplingParams) -> None:
    """Add a flag for each field of EngineConfig except those that `skip_fields_of` also has.

    One flag sets such a field in both, so that `--seed 1` reproduces everything that is sampled.
    """
    flags.add_fields(parser, "model", EngineConfig, skip=[field.name for field in fields(skip_fields_of)])


def add_sampling(parser: Parser, skip: Collection[str] = ()) -> None:
    """Add a flag for each field of SamplingParams."""
    flags.add_fields(parser, "sampling", SamplingParams, skip)


def add_output(parser: Parser, json: str | None) -> None:
    """Add the output flags: --trace, and --json with the help `json` unless that is None."""
    group = parser.add_argument_group("output")
    if json is not None:
        group.add_argument("--json", action="store_true", help=json)
    group.add_argument(
        "--trace",
        action=argparse.BooleanOptionalAction,
        default=Request.trace,
        help="record each token's weights, rewards and strength; without it decoding may be faster "
        f"(default: {flags.format_default(Request.trace)})",
    )


def engine_config(args: argparse.Namespace) -> EngineConfig:
    """The engine config from the flags. Raises InputError for a value out of range."""
    return EngineConfig(**flags.fields_from_args(EngineConfig, args))


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    """The sampling parameters from the flags. Raises InputError for a value out of range."""
    return SamplingParams(**flags.fields_from_args(SamplingParams, args))


def read_prompt(prompt: str) -> str:
    """The prompt, read from stdin if it is "-". Raises InputError if stdin is closed or not UTF-8."""
    if prompt != "-":
        return prompt
    with _report_decode_errors():
        return get_stdin().read().rstrip("\n")


def get_stdin() -> TextIO:
    """Standard input. Raises InputError if it is closed."""
    if sys.stdin is None:
        raise InputError("standard input is closed")
    return sys.stdin


def read_lines(source: Iterable[str]) -> Iterator[str]:
    """Lines of a stream as they arrive. Raises InputError for invalid UTF-8."""
    with _report_decode_errors():
        yield from source


@contextmanager
def _report_decode_errors() -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise InputError(
            f"standard input is not valid UTF-8 ({error.reason} at byte {error.start})"
        ) from None


def build_messages(prompt: str, system: str | None) -> str | list[dict[str, Any]]:
    """The prompt of a Request: the text alone, or messages if there is a system prompt."""
    if system is None:
        return prompt
    return [{"role": "system", "content": system}, {"role": "user", "content": prompt}]
