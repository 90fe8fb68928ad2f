"""What benches share: their flags, what they ask of an engine, and what their JSON says of both."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ...kernels.common.errors import RunError
from ..cli import flags, method_args
from ..common import environment
from .workload import Traffic

if TYPE_CHECKING:
    from ...engine.engine import Engine
    from ...engine.methods.base import Method
    from ...engine.outputs import Output
    from ..cli.parser import Parser


def add_traffic(parser: Parser) -> None:
    """A flag for each field of Traffic, and those of the methods."""
    flags.add_fields(parser, "traffic", Traffic)
    method_args.add_flags(parser)


def said(bench: str, method: Method, *options: Any) -> dict[str, Any]:
    """The head of a bench's JSON: settings (the later of one name), method, machine and commit."""
    settings = {name: value for each in options for name, value in asdict(each).items()}
    steered = {"name": method.name, **asdict(method)}
    return {"bench": bench, "config": settings, "method": steered, **environment.where()}


def vocabulary(engine: Engine) -> int:
    """Ids below this have both a token and a row of the model."""
    return min(engine.tokenizer.vocab_size, engine.model_config.vocab_size)


def require_answers(outputs: list[Output], tokens: int) -> None:
    """Raises RunError where one is not as long as it was to be, and says why."""
    for output in outputs:
        if len(output.token_ids) != tokens:
            raise RunError(
                f"a request ended after {len(output.token_ids)} of {tokens} tokens: {output.error}"
            )
