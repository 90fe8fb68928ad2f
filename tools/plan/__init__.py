"""`trimtab plan`: estimate the devices that a load of steered requests needs, and its latency.

Sizes come from the model's config, peaks from data sheets or a measurement of this machine's CPU. The
fraction of the peaks that a step reaches is an assumption, `--efficiency`. Nothing is loaded or decoded.
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
from ..cli.terminal import is_tty
from ..commands.info import dtype_bits
from ..common import datasheets
from . import report
from .config import PlanConfig

if TYPE_CHECKING:
    import argparse

    from ...models.config import ModelConfig
    from ..cli.parser import Parser
    from .sizing import Estimate


def add_arguments(parser: Parser) -> None:
    """Add a flag for each field of PlanConfig, and --json."""
    flags.add_fields(parser, "plan", PlanConfig)
    parser.add_argument("--json", action="store_true", help="print one line of JSON")


def run(args: argparse.Namespace) -> int:
    """Print a plan. All arguments are checked before the model is located."""
    plan = PlanConfig(**flags.fields_from_args(PlanConfig, args))
    plans = {name: report.estimate_to_dict(estimate, plan) for name, estimate in plan_load(plan).items()}
    if args.json:
        print(dumps({"assumed": asdict(plan), "plans": plans}))
    else:
        Console(width=None if is_tty() else 100).print(report.make_table(plans, plan))
    return 0


def plan_load(plan: PlanConfig) -> dict[str, Estimate]:
    """Estimates for the load in three scenarios: "steered"; "plain", without steering; "uncoupled", with each
    branch as a separate request, without a shared prefix or mixing.

    Raises InputError for an unknown model, or one that does not fit.
    """
    from ...models.loader.presets import resolve_config  # noqa: PLC0415 - imports torch, which --help does not need

    with progress(f"trimtab: finding {plan.model} …") as on_progress:
        config, _ = resolve_config(plan.model, on_progress)
    total_len = plan.prompt + plan.output
    if total_len > config.context_length:
        raise InputError(
            f"prompt and output are {total_len} tokens; {plan.model} takes {config.context_length}"
        )
    return estimate_scenarios(config, plan)


def estimate_scenarios(config: ModelConfig, plan: PlanConfig) -> dict[str, Estimate]:
    """As `plan_load`, for a model's config."""
    from torch import device  # noqa: PLC0415

    from ...kernels.linear.registry import select_format  # noqa: PLC0415
    from ...models.decoder import weight_bytes  # noqa: PLC0415
    from ...models.weights.safetensors import torch_dtype  # noqa: PLC0415
    from .replica import Assumptions, Demand, Replica  # noqa: PLC0415
    from .sizing import estimate  # noqa: PLC0415

    dtype = config.dtype if plan.dtype == "auto" else plan.dtype
    gpu, itemsize = datasheets.get_gpu(plan.gpu, config, dtype), dtype_bits(dtype) // 8
    where = device("cpu" if plan.gpu == datasheets.CPU else "cuda")
    model_bytes = weight_bytes(config, select_format(torch_dtype(dtype), where).bytes_per_weight, where)
    block_size = EngineConfig.block_size
    steered = Demand(
        plan.rps, plan.branches, plan.prompt, plan.output, plan.shared // block_size * block_size
    )
    scenarios = {
        "steered": steered,
        "plain": replace(steered, branches=1, shared_len=0),
        "uncoupled": replace(steered, rps=plan.rps * plan.branches, branches=1, shared_len=0),
    }
    assumptions = Assumptions(
        plan.efficiency,
        plan.all_reduce_us / 1e6,
        plan.gpu_memory_utilization,
        plan.load,
        plan.max_num_batched_tokens,
        None if plan.tpot_ms is None else plan.tpot_ms / 1e3,
    )
    return {
        name: estimate(
            Replica(config, itemsize, model_bytes, demand, gpu, assumptions, 1), plan.tensor_parallel_size
        )
        for name, demand in scenarios.items()
    }
