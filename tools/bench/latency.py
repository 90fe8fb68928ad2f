"""`trimtab bench latency`: latency of one batch, time to first token, and time of a decoding step.

The step time is the decode time (first to last token) of the request that was prefilled last, divided by the
number of tokens after the first. It is compared with two floors: the bytes that a step must read divided by
the measured bandwidth, and the step's matrix multiplications alone.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ...engine.utils.fields import config_field, validate_rules, validate_types
from ...engine.utils.json import dumps
from ...kernels.common.errors import InputError
from ..cli import flags, open_engine
from ..cli.common_args import add_model, engine_config
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

COUNT_RULE = "an integer from 1 to 10000"


@dataclass(frozen=True)
class LatencyConfig:
    """Batch size and number of iterations."""

    batch_size: int = config_field(1, "requests decoded together")
    num_iters: int = config_field(10, "measured iterations")
    num_iters_warmup: int = config_field(2, "warm-up iterations")

    def __post_init__(self) -> None:
        validate_types(self)
        validate_rules(
            self,
            ("batch_size", 1 <= self.batch_size <= 10_000, COUNT_RULE),
            ("num_iters", 1 <= self.num_iters <= 10_000, COUNT_RULE),
            ("num_iters_warmup", 0 <= self.num_iters_warmup <= 10_000, "an integer from 0 to 10000"),
        )


@dataclass
class LatencySamples:
    """Seconds, one entry per iteration.

    latency: the whole batch. ttft: median time to first token. step: a decoding step. products: the matrix
    multiplications of a step, measured right after the batch.
    """

    latency: list[float] = field(default_factory=list)
    ttft: list[float] = field(default_factory=list)
    step: list[float] = field(default_factory=list)
    products: list[float] = field(default_factory=list)

    @property
    def ratios(self) -> list[float]:
        """step / products of each iteration."""
        return [a / b for a, b in zip(self.step, self.products, strict=True)]


def add_arguments(parser: Parser) -> None:
    flags.add_fields(parser, "latency", LatencyConfig)
    common.add_workload_args(parser)
    add_model(parser, workload.WorkloadConfig)


def run(args: argparse.Namespace) -> int:
    """Measure and print. All arguments are checked before the model is loaded."""
    bench_config, load, method, config = configs_from_args(args)
    num_rows = load.num_rows(bench_config.batch_size, method)
    engine = open_engine.open_engine(config)
    requests = load.request_batches(bench_config.batch_size, common.usable_vocab_size(engine), method)
    samples = _measure(engine, requests, load.output_len, bench_config, num_rows)
    metrics = _compute_metrics(engine, num_rows, load, samples, bench_config.batch_size)
    print("\n".join(_format_lines(num_rows, metrics, samples)))
    metadata = common.build_metadata("latency", method, bench_config, config, load)
    print(dumps({**metadata, **metrics, "raw": {**vars(samples), "ratios": samples.ratios}}))
    return 0


def configs_from_args(
    args: argparse.Namespace,
) -> tuple[LatencyConfig, workload.WorkloadConfig, Method, EngineConfig]:
    """The settings of the bench, workload, method and engine.

    Raises InputError for a value out of range, or if the batch has more branches than max_num_seqs.
    """
    bench_config = LatencyConfig(**flags.fields_from_args(LatencyConfig, args))
    load, _, method = workload.workload_from_args(args)
    config = engine_config(args)
    num_rows = load.num_rows(bench_config.batch_size, method)
    if num_rows > config.max_num_seqs:
        raise InputError(
            f"batch_size is {bench_config.batch_size}, which makes {num_rows} branches; max_num_seqs allows "
            f"{config.max_num_seqs} at once"
        )
    return bench_config, load, method, config


def _measure(
    engine: Engine,
    requests: Iterator[list[Request]],
    output_len: int,
    bench_config: LatencyConfig,
    num_rows: int,
) -> LatencySamples:
    from .matmul_floor import MatmulFloor  # noqa: PLC0415 - imports torch, which --help does not need

    samples, matmuls = LatencySamples(), MatmulFloor(engine, num_rows)
    for index in range(bench_config.num_iters_warmup + bench_config.num_iters):
        request_batch = next(requests)
        start = time.perf_counter()
        outputs = engine.generate(request_batch)
        latency = time.perf_counter() - start
        common.check_output_lengths(outputs, output_len)
        if index >= bench_config.num_iters_warmup:
            samples.latency.append(latency)
            samples.ttft.append(statistics.median([o.timings.queue + o.timings.prefill for o in outputs]))
            samples.step.append(min(o.timings.decode for o in outputs) / (output_len - 1))
            samples.products.append(matmuls.measure())
    return samples


def _compute_metrics(
    engine: Engine, num_rows: int, load: workload.WorkloadConfig, samples: LatencySamples, batch_size: int
) -> dict[str, Any]:
    from ..common import machine_peaks, roofline  # noqa: PLC0415 - imports torch

    peaks = machine_peaks.measure_peaks(engine.dtype, engine.device)
    read_bytes = roofline.weight_bytes(engine) + roofline.kv_bytes(engine, num_rows, load.mean_context_len)
    step_time = statistics.median(samples.step)
    return {
        **statistics.summarize([1e3 * s for s in samples.latency], "latency_ms"),
        **statistics.summarize([1e3 * s for s in samples.ttft], "ttft_ms"),
        **statistics.summarize([1e3 * s for s in samples.step], "step_ms"),
        "rows": num_rows,
        "decode_throughput": batch_size / step_time,
        "row_throughput": num_rows / step_time,
        "bytes": read_bytes,
        "gigabytes_per_second": read_bytes / step_time / 1e9,
        "measured_bandwidth": peaks.bandwidth / 1e9,
        "bandwidth_share": read_bytes / step_time / peaks.bandwidth,
        "gigaflops": roofline.product_flops(engine, num_rows) / step_time / 1e9,
        "measured_gigaflops": peaks.flops / 1e9,
        "products_ms": 1e3 * statistics.median(samples.products),
        "step_over_products": statistics.median(samples.ratios),
    }


def _format_lines(num_rows: int, metrics: dict[str, Any], samples: LatencySamples) -> list[str]:
    """The results as lines of text."""
    share_text = f"{metrics['bandwidth_share']:.0%} of the measured {metrics['measured_bandwidth']:.1f}"
    return [
        statistics.format_row("latency, ms", statistics.format_spread([1e3 * s for s in samples.latency])),
        statistics.format_row("first token, ms", statistics.format_spread([1e3 * s for s in samples.ttft])),
        statistics.format_row(
            f"step of {num_rows} rows, ms", statistics.format_spread([1e3 * s for s in samples.step])
        ),
        statistics.format_row(
            "  tok/s", f"{metrics['decode_throughput']:.1f}; all branches {metrics['row_throughput']:.1f}"
        ),
        statistics.format_row("  GB/s", f"{metrics['gigabytes_per_second']:.1f}, {share_text}"),
        statistics.format_row(
            "  GFLOP/s", f"{metrics['gigaflops']:.0f} of the measured {metrics['measured_gigaflops']:.0f}"
        ),
        statistics.format_row(
            "matrix multiplications alone, ms", statistics.format_spread([1e3 * s for s in samples.products])
        ),
        statistics.format_row("  step / matrix multiplications", statistics.format_spread(samples.ratios)),
    ]
