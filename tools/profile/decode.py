"""`trimtab profile decode`: where the time of a decoding step goes, stage by stage.

The stages are timed on the host, which on a CPU is where they run, in steps that are launched one by one. On
a GPU a profiler's pass follows: what the GPU did in each stage of such steps, and how many launches and how
much waiting a step has, captured and not. Beside each stage stands the least time that its bytes and flops
take at this machine's measured roofs.
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
from ..bench.latency import Batch
from ..bench.workload import Traffic
from ..cli import flags, open_engine
from ..cli.common_args import add_model
from ..cli.terminal import watched
from ..common import statistics
from . import gpu_activity
from .stages import REST, STAGES, Stages, marked

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from ...engine.engine import Engine
    from ...engine.request import Request
    from ..cli.parser import Parser

SETTLING, TRACED = 2, 4
"""Of a traced answer, the decoding steps before those that are traced, and these."""


def add_arguments(parser: Parser) -> None:
    """The flags of bench latency, --trace and --json."""
    flags.add_fields(parser, "decode", Batch)
    common.add_traffic(parser)
    add_model(parser, Traffic)
    parser.add_argument("--trace", metavar="FILE", help=f"write {TRACED} steps as a Chrome trace (JSON)")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")


def run(args: argparse.Namespace) -> int:
    """Measures and prints; everything typed is checked before the model is loaded."""
    batch, load, method, config = latency.settings(args)
    rows = load.rows(batch.batch_size, method)
    trace = _trace_file(args.trace, load.output_len)
    engine = open_engine.open_engine(config)
    requests = load.requests(batch.batch_size, common.vocabulary(engine), method)
    steps = _timed(engine, requests, batch, rows)
    floors = _floors(engine, rows, load.mean_len)
    found: dict[str, Any] = {"rows": rows, "steps": len(steps), "stages": _figures(steps, floors)}
    on_gpu = engine.device.type == "cuda"
    if trace or on_gpu:
        events = _traced(engine, next(requests), rows, trace, graphs=False)
        found |= {"gpu": _on_gpu(engine, requests, rows, events)} if on_gpu else {}
    if args.json:
        print(dumps({**common.said("decode", method, batch, config, load), **found}))
    else:
        Console(width=None if watched() else 100).print(_table(found))
    return 0


def _trace_file(name: str | None, output_len: int) -> Path | None:
    """Raises InputError where no trace can be written, or there are too few steps for it."""
    if name is None:
        return None
    path, least = Path(name), SETTLING + TRACED + 1
    if not path.parent.is_dir() or path.is_dir():
        raise InputError(f"--trace is {name!r}; it must be a file in a folder that is there")
    if output_len < least:
        raise InputError(f"output_len is {output_len}; a trace needs answers of at least {least} tokens")
    return path


def _timed(
    engine: Engine, requests: Iterator[list[Request]], batch: Batch, rows: int
) -> list[dict[str, float]]:
    """Seconds by stage of every decoding step of all iterations but those that warm up."""
    stages = Stages(rows)
    with marked(engine, stages), _launched(engine):
        for index in range(batch.num_iters_warmup + batch.num_iters):
            if index == batch.num_iters_warmup:
                stages.steps.clear()
            _answer(engine, next(requests))
    return stages.steps


@contextmanager
def _launched(engine: Engine) -> Iterator[None]:
    """Within, operations are launched one by one, of a step at a time: no captured step can be seen into."""
    core, runner = engine._core, engine._core.runner
    before = runner.graphs, core.looks_ahead
    runner.graphs, core.looks_ahead = None, False
    try:
        yield
    finally:
        runner.graphs, core.looks_ahead = before


def _answer(engine: Engine, asked: list[Request]) -> None:
    common.require_answers(engine.generate(asked), asked[0].sampling.max_tokens)


def _floors(engine: Engine, rows: int, context: float) -> dict[str, float]:
    """Seconds that each stage takes at the machine's roofs."""
    from ...models import roofline  # noqa: PLC0415 - it brings torch, which --help does not need
    from ..common import machine_peaks  # noqa: PLC0415

    roofs = machine_peaks.measured(engine.dtype, engine.device)
    floors = dict.fromkeys(STAGES, 0.0)
    for part in roofline.decoding(engine.model_config, rows, context, engine.dtype.itemsize):
        floors[part.stage] += part.seconds(roofs.bandwidth, roofs.products)
    return floors


def _figures(steps: list[dict[str, float]], floors: dict[str, float]) -> list[dict[str, Any]]:
    """A row for each stage that took any time, and one for the step; shares are of all time together."""
    whole = [sum(step.values()) for step in steps]
    columns = {stage: [step[stage] for step in steps] for stage in STAGES}
    rows = [
        _row(stage, seconds, sum(whole), floors[stage]) for stage, seconds in columns.items() if any(seconds)
    ]
    return [*rows, _row("step", whole, sum(whole), sum(floors.values()))]


def _row(stage: str, seconds: list[float], whole: float, floor: float) -> dict[str, Any]:
    spread = {f"p{percent}_us": 1e6 * statistics.percentile(seconds, percent) for percent in (20, 50, 80)}
    return {"stage": stage, **spread, "share": sum(seconds) / whole, "floor_us": 1e6 * floor}


def _on_gpu(
    engine: Engine, requests: Iterator[list[Request]], rows: int, events: list[Any]
) -> dict[str, Any]:
    """The GPU's time by stage in steps launched one by one; launches and gaps of those and of captured."""
    by_stage = gpu_activity.by_stage(events, TRACED)
    by_stage[REST] = by_stage.get(REST, 0.0) + by_stage.pop(gpu_activity.STEP, 0.0)
    steps = {"launched one by one": gpu_activity.busy(gpu_activity.spans(events), TRACED)}
    if engine.stats.captured:
        captured = _traced(engine, next(requests), rows, None, graphs=True)
        steps["captured"] = gpu_activity.busy(gpu_activity.spans(captured), TRACED)
    return {"stages": by_stage, "steps": {name: asdict(each) for name, each in steps.items()}}


def _traced(
    engine: Engine, asked: list[Request], rows: int, trace: Path | None, *, graphs: bool
) -> list[Any]:
    """The events of some decoding steps, which are written as a Chrome trace where one is asked for."""
    from torch.autograd.profiler import record_function  # noqa: PLC0415
    from torch.profiler import profile, schedule  # noqa: PLC0415

    of_step = schedule(wait=SETTLING - 1, warmup=1, active=TRACED, repeat=1)
    with profile(schedule=of_step) as profiler:
        stages = Stages(rows, lambda stage: record_function(gpu_activity.PREFIX + stage), profiler.step)
        with marked(engine, stages), nullcontext() if graphs else _launched(engine):
            _answer(engine, asked)
    if trace is not None:
        part = trace.with_name(f".{trace.name}.part")
        profiler.export_chrome_trace(str(part))
        os.replace(part, trace)
    return list(profiler.events() or [])


def _table(found: dict[str, Any]) -> Table:
    table = Table(title=f"{found['rows']} rows, {found['steps']} decoding steps, microseconds of the host")
    table.add_column("stage")
    gpu = found.get("gpu", {"stages": {}, "steps": {}})
    for name in ("p20", "p50", "p80", "share", "at the roofs", *(["the GPU"] * ("gpu" in found))):
        table.add_column(name, justify="right")
    for row in found["stages"]:
        spread = (statistics.number(row[f"p{percent}_us"]) for percent in (20, 50, 80))
        of_gpu = [statistics.number(gpu["stages"].get(row["stage"], 0.0))] * ("gpu" in found)
        least = statistics.number(row["floor_us"]) if row["floor_us"] else ""
        table.add_row(row["stage"], *spread, f"{row['share']:.1%}", least, *of_gpu)
    table.caption = "\n".join(
        f"{name}: {statistics.number(each['launches'])} launches a step, the GPU works "
        f"{statistics.number(each['busy_us'])} and waits {statistics.number(each['gap_us'])}"
        for name, each in gpu["steps"].items()
    )
    return table
