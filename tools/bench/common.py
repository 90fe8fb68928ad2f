"""Flags, checks and JSON metadata shared by the benches."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ...kernels.common.errors import RunError
from ..cli import flags, method_args
from ..common import environment
from .workload import WorkloadConfig

if TYPE_CHECKING:
    from ...engine.engine import Engine
    from ...engine.methods.base import Method
    from ...engine.outputs import Output
    from ..cli.parser import Parser


def add_workload_args(parser: Parser) -> None:
    """Add a flag for each field of WorkloadConfig, and the method flags."""
    flags.add_fields(parser, "traffic", WorkloadConfig)
    method_args.add_method_flags(parser)


def build_metadata(bench: str, method: Method, *configs: Any) -> dict[str, Any]:
    """The first fields of a bench's JSON: settings (of one name the last), method, machine and commit."""
    settings = {name: value for config in configs for name, value in asdict(config).items()}
    method_fields = {"name": method.name, **asdict(method)}
    return {"bench": bench, "config": settings, "method": method_fields, **environment.run_metadata()}


def usable_vocab_size(engine: Engine) -> int:
    """Number of ids that have both a token in the tokenizer and a row in the model."""
    return min(engine.tokenizer.vocab_size, engine.model_config.vocab_size)


def check_output_lengths(outputs: list[Output], num_tokens: int) -> None:
    """Raises RunError, with the reason, for an output that does not have `num_tokens` tokens."""
    for output in outputs:
        if len(output.token_ids) != num_tokens:
            raise RunError(
                f"a request ended after {len(output.token_ids)} of {num_tokens} tokens: {output.error}"
            )
