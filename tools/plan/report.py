"""An estimate as numbers for JSON, and as a table for people."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.table import Table

from ..commands.info import size
from ..common.statistics import number

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from .config import Asked
    from .sizing import Estimate


def _ms(value: float) -> str:
    return f"{number(value)} ms"


def _tera(value: float) -> str:
    return f"{number(value / 1e12)} TFLOP"


def _bytes(value: float) -> str:
    return size(round(value))


ROWS: dict[str, tuple[str, Callable[[float], str]]] = {
    "gpus": ("devices", str),
    "tensor_parallel_size": ("  that hold one model", str),
    "load": ("  share of their highest rate", "{:.0%}".format),
    "rows_in_flight": ("rows that a replica decodes at once", number),
    "most_rows": ("  and at most", str),
    "weight_bytes": ("weights, each device", _bytes),
    "workspace_bytes": ("the largest step, each device", _bytes),
    "kv_bytes_per_row": ("keys and values, a row", _bytes),
    "kv_bytes": ("  all rows of a replica", _bytes),
    "step_bytes": ("a step reads and writes", _bytes),
    "step_flops": ("  and computes", _tera),
    "step_floor_ms": ("  takes at the peaks", _ms),
    "step_ms": ("  is expected to take", _ms),
    "prefill_flops": ("a request's prompts compute", _tera),
    "prefill_ms": ("  are expected to take", _ms),
    "ttft_ms": ("to the first token", _ms),
    "tpot_ms": ("from token to token", _ms),
    "tokens_per_second": ("tokens of answers a second", number),
    "gpu_hours_per_million": ("device hours for a million of them", number),
    "cost_per_million": ("cost of a million of them", number),
}


def figures(found: Estimate, asked: Asked) -> dict[str, Any]:
    """An estimate in numbers: of one replica, but for gpus, replicas and tokens_per_second; weight_bytes and
    workspace_bytes are of one device.
    """
    one, requests, rate = found.replica, found.requests, found.rate
    running = max(requests, 1)  # in a step
    parts = one.decoding(running)
    tokens = asked.rps * asked.output  # a request's branches give one answer
    hours = found.gpus * 1e6 / tokens / 3600
    return {
        "gpus": found.gpus,
        "tensor_parallel_size": one.shares,
        "replicas": found.replicas,
        "load": rate / one.rate(one.most),
        "requests_in_flight": requests,
        "rows_in_flight": requests * one.demand.branches,
        "most_rows": one.most * one.demand.branches,
        "weight_bytes": one.weights,
        "workspace_bytes": one.workspace,
        "kv_bytes_per_row": one.kv_request / one.demand.branches,
        "kv_bytes": requests * one.kv_request,
        "step_bytes": sum(part.bytes for part in parts) * one.shares,
        "step_flops": sum(part.flops for part in parts) * one.shares,
        "step_floor_ms": 1e3 * one.floor(running),
        "step_ms": 1e3 * one.step(running),
        "prefill_flops": sum(part.flops for part in one.prompts) * one.shares,
        "prefill_ms": 1e3 * one.prefill,
        "tpot_ms": 1e3 * one.tpot(requests),
        "ttft_ms": 1e3 * one.ttft(rate),
        "tokens_per_second": tokens,
        "gpu_hours_per_million": hours,
        "cost_per_million": None if asked.price is None else hours * asked.price,
    }


def table(plans: Mapping[str, Mapping[str, Any]], asked: Asked) -> Table:
    """A column for each plan."""
    title = (
        f"{asked.model} on {asked.gpu}: {asked.rps:g} requests a second, {asked.branches} branches, "
        f"{asked.prompt} + {asked.output} tokens, at {asked.efficiency:.0%} of the peaks"
    )
    found = Table(title=title)
    for column in ("", *plans):
        found.add_column(column, justify="right" if column else "left")
    for key, (label, said) in ROWS.items():
        values = [plan[key] for plan in plans.values()]
        if None not in values:
            found.add_row(label, *map(said, values))
    return found
