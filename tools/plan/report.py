"""An estimate as JSON values and as a table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.table import Table

from ..commands.info import format_bytes
from ..common.statistics import format_number

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from .config import PlanConfig
    from .sizing import Estimate


def _ms(value: float) -> str:
    return f"{format_number(value)} ms"


def _tera(value: float) -> str:
    return f"{format_number(value / 1e12)} TFLOP"


def _bytes(value: float) -> str:
    return format_bytes(round(value))


ROWS: dict[str, tuple[str, Callable[[float], str]]] = {
    "gpus": ("devices", str),
    "tensor_parallel_size": ("  per replica", str),
    "load": ("  fraction of their maximum rate", "{:.0%}".format),
    "rows_in_flight": ("rows of a replica's batch", format_number),
    "most_rows": ("  maximum", str),
    "weight_bytes": ("weights per device", _bytes),
    "workspace_bytes": ("largest step, per device", _bytes),
    "kv_bytes_per_row": ("KV cache per row", _bytes),
    "kv_bytes": ("  of all rows of a replica", _bytes),
    "step_bytes": ("a step reads and writes", _bytes),
    "step_flops": ("  and computes", _tera),
    "step_floor_ms": ("  takes at the peaks", _ms),
    "step_ms": ("  is expected to take", _ms),
    "prefill_flops": ("prefill of a request computes", _tera),
    "prefill_ms": ("  is expected to take", _ms),
    "ttft_ms": ("time to first token", _ms),
    "tpot_ms": ("time per output token", _ms),
    "tokens_per_second": ("output tokens per second", format_number),
    "gpu_hours_per_million": ("device hours per million tokens", format_number),
    "cost_per_million": ("cost per million tokens", format_number),
}


def estimate_to_dict(estimate: Estimate, plan: PlanConfig) -> dict[str, Any]:
    """An estimate as numbers, of one replica, except gpus, replicas, tokens_per_second and the values per
    million tokens, which are of all, and weight_bytes and workspace_bytes, which are per device.
    """
    replica, num_requests, rate = estimate.replica, estimate.num_requests, estimate.rate
    num_running = max(num_requests, 1)  # a step has at least one request
    ops = replica.decode_ops(num_running)
    tokens_per_second = plan.rps * plan.output  # a request has one answer, whatever its branches
    gpu_hours = estimate.num_gpus * 1e6 / tokens_per_second / 3600
    return {
        "gpus": estimate.num_gpus,
        "tensor_parallel_size": replica.tp_size,
        "replicas": estimate.num_replicas,
        "load": rate / replica.request_rate(replica.max_requests),
        "requests_in_flight": num_requests,
        "rows_in_flight": num_requests * replica.demand.branches,
        "most_rows": replica.max_requests * replica.demand.branches,
        "weight_bytes": replica.weight_bytes_per_gpu,
        "workspace_bytes": replica.workspace_bytes,
        "kv_bytes_per_row": replica.kv_bytes_per_request / replica.demand.branches,
        "kv_bytes": num_requests * replica.kv_bytes_per_request,
        "step_bytes": sum(op.bytes for op in ops) * replica.tp_size,
        "step_flops": sum(part.flops for part in ops) * replica.tp_size,
        "step_floor_ms": 1e3 * replica.min_step_time(num_running),
        "step_ms": 1e3 * replica.step_time(num_running),
        "prefill_flops": sum(part.flops for part in replica.prefill_ops) * replica.tp_size,
        "prefill_ms": 1e3 * replica.prefill_time,
        "tpot_ms": 1e3 * replica.tpot(num_requests),
        "ttft_ms": 1e3 * replica.ttft(rate),
        "tokens_per_second": tokens_per_second,
        "gpu_hours_per_million": gpu_hours,
        "cost_per_million": None if plan.price is None else gpu_hours * plan.price,
    }


def make_table(plans: Mapping[str, Mapping[str, Any]], plan: PlanConfig) -> Table:
    """A table with a column for each scenario."""
    title = (
        f"{plan.model} on {plan.gpu}: {plan.rps:g} requests per second, {plan.branches} branches, "
        f"{plan.prompt} + {plan.output} tokens, at {plan.efficiency:.0%} of the peaks"
    )
    table = Table(title=title)
    for column in ("", *plans):
        table.add_column(column, justify="right" if column else "left")
    for key, (label, fmt) in ROWS.items():
        values = [estimate[key] for estimate in plans.values()]
        if None not in values:
            table.add_row(label, *map(fmt, values))
    return table
