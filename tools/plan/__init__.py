"""`trimtab plan`: how many devices a load of steered requests takes, and how fast its tokens come.

Sizes come from the model's config, peaks from data sheets or from this machine's CPU, and how near a step
comes to them is an assumption, `--efficiency`. Nothing is loaded and nothing is decoded.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING

from rich.console import Console

from ...engine.config import EngineConfig
from ...engine.utils.json import dumps
from ...kernels.common.errors import InputError
from ..cli import flags
from ..cli.display import progress
from ..cli.terminal import watched
from ..commands.info import bits
from ..common import datasheets
from . import report as telling
from .config import Asked

if TYPE_CHECKING:
    import argparse

    from ...models.config import ModelConfig
    from ..cli.parser import Parser
    from .sizing import Estimate


def add_arguments(parser: Parser) -> None:
    """A flag for each field of Asked, and --json."""
    flags.add_fields(parser, "plan", Asked)
    parser.add_argument("--json", action="store_true", help="print one line of JSON")


def run(args: argparse.Namespace) -> int:
    """Everything that was typed is checked before a model is looked for."""
    asked = Asked(**flags.given(Asked, args))
    plans = {name: telling.figures(found, asked) for name, found in planned(asked).items()}
    if args.json:
        print(dumps({"assumed": asdict(asked), "plans": plans}))
    else:
        Console(width=None if watched() else 100).print(telling.table(plans, asked))
    return 0


def planned(asked: Asked) -> dict[str, Estimate]:
    """What carries the load: steered; not steered at all; and as a request of its own for each branch, which
    share no prompt and are not mixed.

    Raises InputError when there is no such model, or no room for it.
    """
    from ...models.loader.presets import find  # noqa: PLC0415 - it brings torch, which --help does not need

    with progress(f"trimtab: finding {asked.model} …") as report:
        config, _ = find(asked.model, report)
    longest = asked.prompt + asked.output
    if longest > config.context:
        raise InputError(f"prompt and output are {longest} tokens; {asked.model} takes {config.context}")
    return estimates(config, asked)


def estimates(config: ModelConfig, asked: Asked) -> dict[str, Estimate]:
    """As `planned`, of a model that was found."""
    from torch import device  # noqa: PLC0415

    from ...models.llama import held_bytes  # noqa: PLC0415
    from .replica import Demand, Replica, Terms  # noqa: PLC0415
    from .sizing import estimate  # noqa: PLC0415

    dtype = config.dtype if asked.dtype == "auto" else asked.dtype
    gpu, itemsize = datasheets.of(asked.gpu, config, dtype), bits(dtype) // 8
    held = held_bytes(config, itemsize, device("cpu" if asked.gpu == datasheets.CPU else "cuda"))
    block = EngineConfig.block_size
    steered = Demand(asked.rps, asked.branches, asked.prompt, asked.output, asked.shared // block * block)
    demands = {
        "steered": steered,
        "plain": replace(steered, branches=1, shared=0),
        "uncoupled": replace(steered, rps=asked.rps * asked.branches, branches=1, shared=0),
    }
    terms = Terms(
        asked.efficiency,
        asked.all_reduce_us / 1e6,
        asked.gpu_memory_utilization,
        asked.load,
        asked.max_num_batched_tokens,
        None if asked.tpot_ms is None else asked.tpot_ms / 1e3,
    )
    return {
        name: estimate(Replica(config, itemsize, held, demand, gpu, terms, 1), asked.tensor_parallel_size)
        for name, demand in demands.items()
    }
