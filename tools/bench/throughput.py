"""`trimtab bench throughput`: many requests at once, and optionally one after another."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from itertools import cycle
from typing import TYPE_CHECKING, Any

from ...engine.utils.fields import config_field, invalid_value, validate_rules, validate_types
from ...engine.utils.json import dumps
from ..cli import flags, open_engine
from ..cli.common_args import add_model, engine_config
from ..common import questions, statistics
from . import common, workload

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from ...engine.engine import Engine
    from ...engine.outputs import Output
    from ...engine.request import Request
    from ..cli.parser import Parser

BUILTIN_DATASET = "questions"
"""The name of the bundled dataset."""
COUNT_RULE = "an integer from 1 to 100000"


@dataclass(frozen=True)
class ThroughputConfig:
    """Number of requests and iterations, comparison and dataset."""

    num_prompts: int = config_field(16, "requests submitted at once")
    num_iters: int = config_field(3, "measured iterations")
    num_iters_warmup: int = config_field(1, "warm-up iterations")
    one_by_one: bool = config_field(False, "in each iteration, also run as many requests one after another")
    dataset_path: str | None = config_field(
        None,
        f"questions instead of random tokens: a file in the format of evaluate, or {BUILTIN_DATASET!r}, "
        f"the bundled ones",
    )

    def __post_init__(self) -> None:
        validate_types(self)
        validate_rules(
            self,
            ("num_prompts", 1 <= self.num_prompts <= 100_000, COUNT_RULE),
            ("num_iters", 1 <= self.num_iters <= 100_000, COUNT_RULE),
            ("num_iters_warmup", 0 <= self.num_iters_warmup <= 100_000, "an integer from 0 to 100000"),
        )

    def with_dataset(self, requests: Iterator[list[Request]]) -> Iterator[list[Request]]:
        """The batches; with a dataset, the prompts of each are its first questions, repeated if too few."""
        if self.dataset_path is None:
            return requests
        path = None if self.dataset_path == BUILTIN_DATASET else self.dataset_path
        dataset = questions.read_questions(path)
        return (
            [_replace_prompt(*pair) for pair in zip(request_batch, cycle(dataset), strict=False)]
            for request_batch in requests
        )


@dataclass
class ThroughputSamples:
    """One entry per iteration. at_once, one_by_one: seconds. steps: engine steps of the run at once.

    prompts: prompt tokens of all branches.
    """

    at_once: list[float] = field(default_factory=list)
    one_by_one: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    prompts: int = 0

    @property
    def ratios(self) -> list[float]:
        """one_by_one / at_once of each iteration; empty without one_by_one."""
        return [b / a for a, b in zip(self.at_once, self.one_by_one, strict=False)]


def add_arguments(parser: Parser) -> None:
    flags.add_fields(parser, "throughput", ThroughputConfig)
    common.add_workload_args(parser)
    add_model(parser, workload.WorkloadConfig)


def run(args: argparse.Namespace) -> int:
    """Measure and print. All arguments are checked before the model is loaded."""
    bench_config = ThroughputConfig(**flags.fields_from_args(ThroughputConfig, args))
    load, _, method = workload.workload_from_args(args)
    if bench_config.dataset_path is not None and vars(args).get("input_len"):
        raise invalid_value("input_len", load.input_len, "left out with dataset_path")
    config = engine_config(args)
    engine = open_engine.open_engine(config)
    requests = bench_config.with_dataset(
        load.request_batches(bench_config.num_prompts, common.usable_vocab_size(engine), method)
    )
    samples = _measure(engine, requests, load.output_len, bench_config)
    metrics = _compute_metrics(
        engine, load, load.num_rows(bench_config.num_prompts, method), samples, bench_config.num_prompts
    )
    print("\n".join(_format_lines(metrics, samples)))
    metadata = common.build_metadata("throughput", method, bench_config, config, load)
    print(dumps({**metadata, **metrics, "raw": {**vars(samples), "ratios": samples.ratios}}))
    return 0


def _measure(
    engine: Engine, requests: Iterator[list[Request]], output_len: int, bench_config: ThroughputConfig
) -> ThroughputSamples:
    samples = ThroughputSamples()
    for index in range(bench_config.num_iters_warmup + bench_config.num_iters):
        request_batch, single_requests = next(requests), next(requests)
        steps_before, start = engine.stats.steps, time.perf_counter()
        outputs = engine.generate(request_batch)
        common.check_output_lengths(outputs, output_len)
        samples.prompts = _count_prompt_tokens(outputs)
        batch_end, steps = time.perf_counter(), engine.stats.steps - steps_before
        if bench_config.one_by_one:
            common.check_output_lengths([engine.generate(request) for request in single_requests], output_len)
        end = time.perf_counter()
        if index >= bench_config.num_iters_warmup:
            samples.at_once.append(batch_end - start)
            samples.steps.append(steps)
            samples.one_by_one += [end - batch_end] if bench_config.one_by_one else []
    return samples


def _replace_prompt(request: Request, dataset_item: questions.Question) -> Request:
    return replace(request, prompt=dataset_item.text, branch_token_ids=None)


def _count_prompt_tokens(outputs: list[Output]) -> int:
    return sum(len(branch.prompt_token_ids) for output in outputs for branch in output.branches)


def _compute_metrics(
    engine: Engine,
    load: workload.WorkloadConfig,
    num_rows: int,
    samples: ThroughputSamples,
    num_requests: int,
) -> dict[str, Any]:
    from ..common import machine_peaks, roofline  # noqa: PLC0415 - imports torch, which --help does not need

    seconds = statistics.median(samples.at_once)
    bandwidth = machine_peaks.measure_peaks(engine.dtype, engine.device).bandwidth
    kv_read_bytes = load.output_len * roofline.kv_bytes(
        engine, num_rows, samples.prompts / num_rows + load.output_len / 2
    )
    read_bytes = statistics.median(samples.steps) * roofline.weight_bytes(engine) + kv_read_bytes
    output_tokens = num_requests * load.output_len
    return {
        "duration": seconds,
        "completed": num_requests,
        "branches": num_rows,
        "total_input_tokens": samples.prompts,
        "total_output_tokens": output_tokens,
        "request_throughput": num_requests / seconds,
        "output_throughput": output_tokens / seconds,
        "total_token_throughput": (samples.prompts + output_tokens) / seconds,
        "row_throughput": num_rows * load.output_len / seconds,
        "gigabytes_per_second": read_bytes / seconds / 1e9,
        "measured_bandwidth": bandwidth / 1e9,
        "bandwidth_share": read_bytes / seconds / bandwidth,
        "at_once_over_one_by_one": statistics.median(samples.ratios),
    }


def _format_lines(metrics: dict[str, Any], samples: ThroughputSamples) -> list[str]:
    """The results as lines of text."""
    share_text = f"{metrics['bandwidth_share']:.0%} of the measured {metrics['measured_bandwidth']:.1f}"
    lines = [
        statistics.format_row(
            f"{metrics['completed']} requests at once, s", statistics.format_spread(samples.at_once)
        ),
        statistics.format_row("  requests/s", f"{metrics['request_throughput']:.2f}"),
        statistics.format_row("  output tok/s", f"{metrics['output_throughput']:.1f}"),
        statistics.format_row("  output tok/s, all branches", f"{metrics['row_throughput']:.1f}"),
        statistics.format_row(
            "  tok/s with all branches' prompts", f"{metrics['total_token_throughput']:.1f}"
        ),
        statistics.format_row("  GB/s", f"{metrics['gigabytes_per_second']:.1f}, {share_text}"),
    ]
    if samples.one_by_one:
        lines.append(
            statistics.format_row("one after another, s", statistics.format_spread(samples.one_by_one))
        )
        lines.append(
            statistics.format_row("at once / one after another", statistics.format_spread(samples.ratios))
        )
    return lines
