"""`trimtab bench latency`: one batch from its prompts to its last token, and what a decoding step takes.

The time of a step is that from the first token to the last of the request whose prompt was computed last, by
the tokens between. It stands beside two roofs: the bytes that a step must read by the measured bandwidth, and
the step's matrix products alone.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ...engine.utils.fields import check_fields, option, require_fields
from ...engine.utils.json import dumps
from ...kernels.common.errors import InputError
from ..cli import flags, open_engine
from ..cli.common_args import add_model
from ..cli.common_args import config as engine_config
from ..common import statistics
from . import common, workload

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from ...engine.config import EngineConfig
    from ...engine.engine import Engine
    from ...engine.methods.base import Method
    from ...engine.request import Request
    from ..cli.parser import Parser

FEW = "a whole number from 1 to 10000"


@dataclass(frozen=True)
class Batch:
    """How much is decoded at once, and how often."""

    batch_size: int = option(1, "requests that are decoded together")
    num_iters: int = option(10, "how often it is measured")
    num_iters_warmup: int = option(2, "how often it runs before that")

    def __post_init__(self) -> None:
        check_fields(self)
        require_fields(
            self,
            ("batch_size", 1 <= self.batch_size <= 10_000, FEW),
            ("num_iters", 1 <= self.num_iters <= 10_000, FEW),
            ("num_iters_warmup", 0 <= self.num_iters_warmup <= 10_000, "a whole number from 0 to 10000"),
        )


@dataclass
class Times:
    """Seconds, an entry an iteration: the whole batch, its median first token, a decoding step, and the
    matrix products of one, measured right after it."""

    latency: list[float] = field(default_factory=list)
    ttft: list[float] = field(default_factory=list)
    step: list[float] = field(default_factory=list)
    products: list[float] = field(default_factory=list)

    @property
    def ratios(self) -> list[float]:
        """Step / products, within each iteration."""
        return [a / b for a, b in zip(self.step, self.products, strict=True)]


def add_arguments(parser: Parser) -> None:
    flags.add_fields(parser, "latency", Batch)
    common.add_traffic(parser)
    add_model(parser, workload.Traffic)


def run(args: argparse.Namespace) -> int:
    """Measures and prints; everything typed is checked before the model is loaded."""
    batch, load, method, config = settings(args)
    rows = load.rows(batch.batch_size, method)
    engine = open_engine.open_engine(config)
    requests = load.requests(batch.batch_size, common.vocabulary(engine), method)
    times = _measured(engine, requests, load.output_len, batch, rows)
    found = _figures(engine, rows, load, times, batch.batch_size)
    print("\n".join(_lines(rows, found, times)))
    said = common.said("latency", method, batch, config, load)
    print(dumps({**said, **found, "raw": {**vars(times), "ratios": times.ratios}}))
    return 0


def settings(args: argparse.Namespace) -> tuple[Batch, workload.Traffic, Method, EngineConfig]:
    """What is decoded, how it is steered, and by which engine.

    Raises InputError for a value out of range, and where the batch's branches are more than are decoded at
    once.
    """
    batch = Batch(**flags.given(Batch, args))
    load, _, method = workload.asked(args)
    config = engine_config(args)
    rows = load.rows(batch.batch_size, method)
    if rows > config.max_num_seqs:
        raise InputError(
            f"batch_size is {batch.batch_size}, which makes {rows} branches; max_num_seqs allows "
            f"{config.max_num_seqs} at once"
        )
    return batch, load, method, config


def _measured(
    engine: Engine, requests: Iterator[list[Request]], tokens: int, batch: Batch, rows: int
) -> Times:
    from .matmul_floor import Products  # noqa: PLC0415 - it brings torch, which --help does not need

    times, products = Times(), Products(engine, rows)
    for index in range(batch.num_iters_warmup + batch.num_iters):
        asked = next(requests)
        start = time.perf_counter()
        outputs = engine.generate(asked)
        whole = time.perf_counter() - start
        common.require_answers(outputs, tokens)
        if index >= batch.num_iters_warmup:
            times.latency.append(whole)
            times.ttft.append(statistics.median([o.timings.queue + o.timings.prefill for o in outputs]))
            times.step.append(min(o.timings.decode for o in outputs) / (tokens - 1))
            times.products.append(products.seconds())
    return times


def _figures(
    engine: Engine, rows: int, load: workload.Traffic, times: Times, batch_size: int
) -> dict[str, Any]:
    from ..common import machine_peaks, roofline  # noqa: PLC0415 - they bring torch, too

    roofs = machine_peaks.measured(engine.dtype, engine.device)
    read = roofline.weight_bytes(engine) + roofline.kv_bytes(engine, rows, load.mean_len)
    step = statistics.median(times.step)
    return {
        **statistics.summary([1e3 * s for s in times.latency], "latency_ms"),
        **statistics.summary([1e3 * s for s in times.ttft], "ttft_ms"),
        **statistics.summary([1e3 * s for s in times.step], "step_ms"),
        "rows": rows,
        "decode_throughput": batch_size / step,
        "row_throughput": rows / step,
        "bytes": read,
        "gigabytes_per_second": read / step / 1e9,
        "measured_bandwidth": roofs.bandwidth / 1e9,
        "bandwidth_share": read / step / roofs.bandwidth,
        "gigaflops": roofline.step_work(engine, rows) / step / 1e9,
        "measured_gigaflops": roofs.products / 1e9,
        "products_ms": 1e3 * statistics.median(times.products),
        "step_over_products": statistics.median(times.ratios),
    }


def _lines(rows: int, found: dict[str, Any], times: Times) -> list[str]:
    """The figures for people."""
    share = f"{found['bandwidth_share']:.0%} of the {found['measured_bandwidth']:.1f} that memory gives"
    return [
        statistics.line("latency, ms", statistics.spread([1e3 * s for s in times.latency])),
        statistics.line("first token, ms", statistics.spread([1e3 * s for s in times.ttft])),
        statistics.line(f"a step of {rows} rows, ms", statistics.spread([1e3 * s for s in times.step])),
        statistics.line("  tok/s", f"{found['decode_throughput']:.1f}, rows {found['row_throughput']:.1f}"),
        statistics.line("  GB/s", f"{found['gigabytes_per_second']:.1f}, {share}"),
        statistics.line("  GFLOP/s", f"{found['gigaflops']:.0f}, of {found['measured_gigaflops']:.0f}"),
        statistics.line(
            "its matrix products alone, ms", statistics.spread([1e3 * s for s in times.products])
        ),
        statistics.line("  a step / its products", statistics.spread(times.ratios)),
    ]
