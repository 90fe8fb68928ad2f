"""`trimtab profile decode`: time of a decoding step by stage.

Stages are timed by torch's profiler on the host, which on a CPU is where they run, without CUDA graphs and
async scheduling; the profiler adds a few microseconds to each range and operation. On a GPU, another pass
follows: GPU time by stage without CUDA graphs, and the launches and idle time of a step with and without
them. Each stage is listed with its roofline time: the minimum for its bytes and FLOPs at the measured peaks
of this machine.
"""

from __future__ import annotations

import os
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from ...engine.utils.json import dumps
from ...kernels.common.errors import InputError
from ..bench import common, latency
from ..bench.latency import LatencyConfig
from ..bench.workload import WorkloadConfig
from ..cli import flags, open_engine
from ..cli.common_args import add_model
from ..cli.terminal import is_tty
from ..common import statistics
from . import gpu_activity
from .stages import OTHER, STAGES, STEP_RANGE, run_steps, stage_times

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from ...engine.engine import Engine
    from ...engine.request import Request
    from ..cli.parser import Parser

WARMUP_STEPS, TRACED_STEPS = 2, 4
"""Decoding steps before the traced ones, and traced steps."""


def add_arguments(parser: Parser) -> None:
    """Add the flags of `bench latency`, --trace and --json."""
    flags.add_fields(parser, "decode", LatencyConfig)
    common.add_workload_args(parser)
    add_model(parser, WorkloadConfig)
    parser.add_argument(
        "--trace", metavar="FILE", help=f"write {TRACED_STEPS} steps as a Chrome trace (JSON)"
    )
    parser.add_argument("--json", action="store_true", help="print one line of JSON")


def run(args: argparse.Namespace) -> int:
    """Measure and print. All arguments are checked before the model is loaded."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # before torch is imported: its profiler logs to stderr
    bench_config, load, method, config = latency.configs_from_args(args)
    num_rows = load.num_rows(bench_config.batch_size, method)
    trace_path = _check_trace_path(args.trace, load.output_len)
    engine = open_engine.open_engine(config)
    requests = load.request_batches(bench_config.batch_size, common.usable_vocab_size(engine), method)
    steps = _time_stages(engine, requests, bench_config)
    floor_times = _stage_floors(engine, num_rows, load.mean_context_len)
    result: dict[str, Any] = {
        "rows": num_rows,
        "steps": len(steps),
        "stages": _stage_rows(steps, floor_times),
    }
    on_gpu = engine.device.type == "cuda"
    if trace_path or on_gpu:
        events = _trace_steps(engine, next(requests), trace_path, graphs=False)
        result |= {"gpu": _profile_gpu(engine, requests, events)} if on_gpu else {}
    if args.json:
        print(dumps({**common.build_metadata("decode", method, bench_config, config, load), **result}))
    else:
        Console(width=None if is_tty() else 100).print(_make_table(result))
    return 0


def _check_trace_path(name: str | None, output_len: int) -> Path | None:
    """The path of --trace. Raises InputError if it cannot be written or `output_len` is too small."""
    if name is None:
        return None
    path, min_len = Path(name), WARMUP_STEPS + TRACED_STEPS + 1
    if not path.parent.is_dir() or path.is_dir():
        raise InputError(f"--trace is {name!r}; it must be a file in an existing folder")
    if output_len < min_len:
        raise InputError(f"output_len is {output_len}; a trace needs answers of at least {min_len} tokens")
    return path


def _time_stages(
    engine: Engine, requests: Iterator[list[Request]], bench_config: LatencyConfig
) -> list[dict[str, float]]:
    """Seconds by stage of each decoding step, warm-up iterations excluded."""
    from torch.profiler import ProfilerActivity, profile  # noqa: PLC0415 - torch, which --help does not need

    steps: list[dict[str, float]] = []
    with _launch_eagerly(engine):
        for index in range(bench_config.num_iters_warmup + bench_config.num_iters):
            with profile(activities=[ProfilerActivity.CPU]) as profiler:
                decoded = list(run_steps(engine, next(requests)))
            if index >= bench_config.num_iters_warmup:
                timed = zip(stage_times(_host_ranges(profiler)), decoded, strict=True)
                steps += [
                    {stage: 1e-9 * time for stage, time in times.items()}
                    for times, is_decode in timed
                    if is_decode
                ]
    return steps


def _host_ranges(profiler: Any) -> Iterator[tuple[int, int, str]]:
    """(start, end, name) of the engine's ranges, in nanoseconds; `profiler.events()` would take minutes."""
    prefix = gpu_activity.RANGE_PREFIX
    for event in profiler.profiler.kineto_results.events():
        if event.name().startswith(prefix) and event.device_type().name == "CPU":
            start = event.start_ns()
            yield start, start + event.duration_ns(), event.name()[len(prefix) :]


@contextmanager
def _launch_eagerly(engine: Engine) -> Iterator[None]:
    """Disable CUDA graphs and async scheduling: stages inside a captured step cannot be timed."""
    core, runner = engine._core, engine._core.runner
    saved = runner.cuda_graphs, core.async_scheduling
    runner.cuda_graphs, core.async_scheduling = None, False
    try:
        yield
    finally:
        runner.cuda_graphs, core.async_scheduling = saved


def _stage_floors(engine: Engine, num_rows: int, context_len: float) -> dict[str, float]:
    """Roofline seconds of each stage at the machine's measured peaks."""
    from ...kernels.linear.registry import select_format  # noqa: PLC0415 - as below
    from ...models import roofline  # noqa: PLC0415 - imports torch, which --help does not need
    from ..common import machine_peaks  # noqa: PLC0415

    peaks = machine_peaks.measure_peaks(engine.dtype, engine.device)
    floors = dict.fromkeys(STAGES, 0.0)
    bytes_per_weight = select_format(engine.dtype, engine.device).bytes_per_weight
    sizes = (num_rows, context_len, engine.dtype.itemsize)
    for op in roofline.decode_step_ops(engine.model_config, *sizes, bytes_per_weight=bytes_per_weight):
        floors[op.stage] += op.roofline_seconds(peaks.bandwidth, peaks.flops)
    return floors


def _stage_rows(steps: list[dict[str, float]], floor_times: dict[str, float]) -> list[dict[str, Any]]:
    """A row for each stage that took time, and one for the step; shares are of the total time."""
    step_times = [sum(step.values()) for step in steps]
    columns = {stage: [step[stage] for step in steps] for stage in STAGES}
    rows = [
        _stage_row(stage, seconds, sum(step_times), floor_times[stage])
        for stage, seconds in columns.items()
        if any(seconds)
    ]
    return [*rows, _stage_row("step", step_times, sum(step_times), sum(floor_times.values()))]


def _stage_row(stage: str, seconds: list[float], total: float, floor_time: float) -> dict[str, Any]:
    spread = {f"p{percent}_us": 1e6 * statistics.percentile(seconds, percent) for percent in (20, 50, 80)}
    return {"stage": stage, **spread, "share": sum(seconds) / total, "floor_us": 1e6 * floor_time}


def _profile_gpu(engine: Engine, requests: Iterator[list[Request]], events: list[Any]) -> dict[str, Any]:
    """GPU time by stage without CUDA graphs; launches, busy and idle time without and with them."""
    stage_times = gpu_activity.time_by_stage(events, TRACED_STEPS)
    stage_times[OTHER] = stage_times.get(OTHER, 0.0) + stage_times.pop(STEP_RANGE, 0.0)
    steps = {
        "launched one by one": gpu_activity.measure_activity(gpu_activity.gpu_spans(events), TRACED_STEPS)
    }
    if engine.stats.captured:
        captured_events = _trace_steps(engine, next(requests), None, graphs=True)
        steps["captured"] = gpu_activity.measure_activity(
            gpu_activity.gpu_spans(captured_events), TRACED_STEPS
        )
    return {"stages": stage_times, "steps": {name: asdict(activity) for name, activity in steps.items()}}


def _trace_steps(
    engine: Engine, requests: list[Request], trace_path: Path | None, *, graphs: bool
) -> list[Any]:
    """The profiler's events of TRACED_STEPS steps, also written to `trace_path` as a Chrome trace."""
    from torch.profiler import profile, schedule  # noqa: PLC0415

    step_schedule = schedule(wait=WARMUP_STEPS - 1, warmup=1, active=TRACED_STEPS, repeat=1)
    with (
        profile(schedule=step_schedule) as profiler,
        nullcontext() if graphs else _launch_eagerly(engine),
    ):
        for is_decode in run_steps(engine, requests):
            if is_decode:
                profiler.step()
    if trace_path is not None:
        tmp_path = trace_path.with_name(f".{trace_path.name}.part")
        profiler.export_chrome_trace(str(tmp_path))
        os.replace(tmp_path, trace_path)
    return list(profiler.events() or [])


def _make_table(result: dict[str, Any]) -> Table:
    table = Table(title=f"{result['rows']} rows, {result['steps']} decoding steps, host microseconds")
    table.add_column("stage")
    gpu = result.get("gpu", {"stages": {}, "steps": {}})
    for name in ("p20", "p50", "p80", "share", "roofline", *(["GPU"] * ("gpu" in result))):
        table.add_column(name, justify="right")
    for row in result["stages"]:
        spread = (statistics.format_number(row[f"p{percent}_us"]) for percent in (20, 50, 80))
        gpu_cell = [statistics.format_number(gpu["stages"].get(row["stage"], 0.0))] * ("gpu" in result)
        floor_text = statistics.format_number(row["floor_us"]) if row["floor_us"] else ""
        table.add_row(row["stage"], *spread, f"{row['share']:.1%}", floor_text, *gpu_cell)
    table.caption = "\n".join(
        f"{name}: {statistics.format_number(each['launches'])} launches per step, GPU busy "
        f"{statistics.format_number(each['busy_us'])} and idle {statistics.format_number(each['gap_us'])}"
        for name, each in gpu["steps"].items()
    )
    return table
