"""`trimtab bench throughput`: many requests at once, and if asked as many one after another."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from itertools import cycle
from typing import TYPE_CHECKING, Any

from ...engine.utils.fields import check_fields, option, refusal, require_fields
from ...engine.utils.json import dumps
from ..cli import flags, open_engine
from ..cli.common_args import add_model
from ..cli.common_args import config as engine_config
from ..common import questions as question
from ..common import statistics
from . import common, workload

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator

    from ...engine.engine import Engine
    from ...engine.outputs import Output
    from ...engine.request import Request
    from ..cli.parser import Parser

OWN = "questions"
"""What trimtab's own are called among the datasets."""
MOST = "a whole number from 1 to 100000"


@dataclass(frozen=True)
class Crowd:
    """How many requests, how often, and beside what."""

    num_prompts: int = option(16, "requests that are given at once")
    num_iters: int = option(3, "how often it is measured")
    num_iters_warmup: int = option(1, "how often it runs before that")
    one_by_one: bool = option(False, "run as many requests one after another, too, in every round")
    dataset_path: str | None = option(
        None,
        f"questions to ask instead of random tokens: a file as evaluate reads it, or {OWN!r}, our own",
    )

    def __post_init__(self) -> None:
        check_fields(self)
        require_fields(
            self,
            ("num_prompts", 1 <= self.num_prompts <= 100_000, MOST),
            ("num_iters", 1 <= self.num_iters <= 100_000, MOST),
            ("num_iters_warmup", 0 <= self.num_iters_warmup <= 100_000, "a whole number from 0 to 100000"),
        )

    def asked(self, requests: Iterator[list[Request]]) -> Iterator[list[Request]]:
        """The requests; with a dataset its first questions instead of their tokens, every time the same."""
        if self.dataset_path is None:
            return requests
        file = None if self.dataset_path == OWN else self.dataset_path
        questions = question.read(file)
        return ([_with(*pair) for pair in zip(some, cycle(questions), strict=False)] for some in requests)


@dataclass
class Times:
    """Seconds, an entry a round: all at once, and one after another; steps of the engine at once.

    prompts: tokens of all branches' prompts.
    """

    at_once: list[float] = field(default_factory=list)
    one_by_one: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    prompts: int = 0

    @property
    def ratios(self) -> list[float]:
        """One after another / at once, within each round; none where only one of them was measured."""
        return [b / a for a, b in zip(self.at_once, self.one_by_one, strict=False)]


def add_arguments(parser: Parser) -> None:
    flags.add_fields(parser, "throughput", Crowd)
    common.add_traffic(parser)
    add_model(parser, workload.Traffic)


def run(args: argparse.Namespace) -> int:
    """Measures and prints; everything typed is checked before the model is loaded."""
    crowd = Crowd(**flags.given(Crowd, args))
    load, _, method = workload.asked(args)
    if crowd.dataset_path is not None and vars(args).get("input_len"):
        raise refusal("input_len", load.input_len, "left out where dataset_path has the prompts")
    config = engine_config(args)
    engine = open_engine.open_engine(config)
    requests = crowd.asked(load.requests(crowd.num_prompts, common.vocabulary(engine), method))
    times = _measured(engine, requests, load.output_len, crowd)
    found = _figures(engine, load, load.rows(crowd.num_prompts, method), times, crowd.num_prompts)
    print("\n".join(_lines(found, times)))
    said = common.said("throughput", method, crowd, config, load)
    print(dumps({**said, **found, "raw": {**vars(times), "ratios": times.ratios}}))
    return 0


def _measured(engine: Engine, requests: Iterator[list[Request]], tokens: int, crowd: Crowd) -> Times:
    times = Times()
    for index in range(crowd.num_iters_warmup + crowd.num_iters):
        asked, singly = next(requests), next(requests)
        before, start = engine.stats.steps, time.perf_counter()
        outputs = engine.generate(asked)
        common.require_answers(outputs, tokens)
        times.prompts = _prompt_tokens(outputs)
        middle, steps = time.perf_counter(), engine.stats.steps - before
        if crowd.one_by_one:
            common.require_answers([engine.generate(request) for request in singly], tokens)
        end = time.perf_counter()
        if index >= crowd.num_iters_warmup:
            times.at_once.append(middle - start)
            times.steps.append(steps)
            times.one_by_one += [end - middle] if crowd.one_by_one else []
    return times


def _with(request: Request, asked: question.Question) -> Request:
    return replace(request, prompt=asked.text, branch_token_ids=None)


def _prompt_tokens(outputs: list[Output]) -> int:
    return sum(len(branch.prompt_token_ids) for output in outputs for branch in output.branches)


def _figures(
    engine: Engine, load: workload.Traffic, rows: int, times: Times, requests: int
) -> dict[str, Any]:
    from ..common import machine_peaks, roofline  # noqa: PLC0415 - they bring torch, which --help does not need

    seconds = statistics.median(times.at_once)
    bandwidth = machine_peaks.measured(engine.dtype, engine.device).bandwidth
    kept = load.output_len * roofline.kv_bytes(engine, rows, times.prompts / rows + load.output_len / 2)
    read = statistics.median(times.steps) * roofline.weight_bytes(engine) + kept
    output = requests * load.output_len
    return {
        "duration": seconds,
        "completed": requests,
        "branches": rows,
        "total_input_tokens": times.prompts,
        "total_output_tokens": output,
        "request_throughput": requests / seconds,
        "output_throughput": output / seconds,
        "total_token_throughput": (times.prompts + output) / seconds,
        "row_throughput": rows * load.output_len / seconds,
        "gigabytes_per_second": read / seconds / 1e9,
        "measured_bandwidth": bandwidth / 1e9,
        "bandwidth_share": read / seconds / bandwidth,
        "at_once_over_one_by_one": statistics.median(times.ratios),
    }


def _lines(found: dict[str, Any], times: Times) -> list[str]:
    """The figures for people."""
    share = f"{found['bandwidth_share']:.0%} of the {found['measured_bandwidth']:.1f} that memory gives"
    lines = [
        statistics.line(f"{found['completed']} requests at once, s", statistics.spread(times.at_once)),
        statistics.line("  requests/s", f"{found['request_throughput']:.2f}"),
        statistics.line("  output tok/s", f"{found['output_throughput']:.1f}"),
        statistics.line("  output tok/s of all branches", f"{found['row_throughput']:.1f}"),
        statistics.line("  tok/s with the prompts of all branches", f"{found['total_token_throughput']:.1f}"),
        statistics.line("  GB/s", f"{found['gigabytes_per_second']:.1f}, {share}"),
    ]
    if times.one_by_one:
        lines.append(statistics.line("one after another, s", statistics.spread(times.one_by_one)))
        lines.append(statistics.line("at once / one after another", statistics.spread(times.ratios)))
    return lines
