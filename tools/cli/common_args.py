"""What generate, chat and compare share: their flags, and the config and sampling that the flags ask for."""

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
    """PROMPT and --system."""
    help = "what to ask; - reads it from standard input"
    parser.add_argument("prompt", metavar="PROMPT", nargs="?" if optional else None, help=help)
    add_system(parser)


def add_system(parser: Parser) -> None:
    """The --system flag."""
    parser.add_argument(
        "--system",
        metavar="TEXT",
        help="the system text, which the objectives follow (default: You are a helpful assistant.)",
    )


def add_model(parser: Parser, skip_fields_of: type = SamplingParams) -> None:
    """A flag for each field of EngineConfig, but for those that `skip_fields_of` has a flag for: one flag
    sets both, so that `--seed 1` repeats whatever is drawn."""
    flags.add_fields(parser, "model", EngineConfig, skip=[field.name for field in fields(skip_fields_of)])


def add_sampling(parser: Parser, skip: Collection[str] = ()) -> None:
    """A flag for each field of SamplingParams."""
    flags.add_fields(parser, "sampling", SamplingParams, skip)


def add_output(parser: Parser, json: str | None) -> None:
    """How answers are told: --trace, and --json where the verb has it (its help)."""
    group = parser.add_argument_group("output")
    if json is not None:
        group.add_argument("--json", action="store_true", help=json)
    group.add_argument(
        "--trace",
        action=argparse.BooleanOptionalAction,
        default=Request.trace,
        help="keep each token's weights, rewards and strength; without it decoding may be faster "
        f"(default: {flags.format_default(Request.trace)})",
    )


def engine_config(args: argparse.Namespace) -> EngineConfig:
    """The engine's config. Raises InputError for a value out of range."""
    return EngineConfig(**flags.fields_from_args(EngineConfig, args))


def sampling_params(args: argparse.Namespace) -> SamplingParams:
    """The sampling parameters. Raises InputError for a value out of range."""
    return SamplingParams(**flags.fields_from_args(SamplingParams, args))


def read_prompt(prompt: str) -> str:
    """The prompt; "-" reads it from stdin."""
    if prompt != "-":
        return prompt
    with _report_decode_errors():
        return get_stdin().read().rstrip("\n")


def get_stdin() -> TextIO:
    """Standard input. Raises InputError where it is closed."""
    if sys.stdin is None:
        raise InputError("standard input is closed; there is nothing to read")
    return sys.stdin


def read_lines(source: Iterable[str]) -> Iterator[str]:
    """Lines as they are typed or piped. Raises InputError at what is no text."""
    with _report_decode_errors():
        yield from source


@contextmanager
def _report_decode_errors() -> Iterator[None]:
    try:
        yield
    except UnicodeDecodeError as error:
        raise InputError(f"standard input is not UTF-8 text ({error.reason} at byte {error.start})") from None


def build_messages(prompt: str, system: str | None) -> str | list[dict[str, Any]]:
    """A prompt for a Request: the text alone, or after a system message."""
    if system is None:
        return prompt
    return [{"role": "system", "content": system}, {"role": "user", "content": prompt}]
