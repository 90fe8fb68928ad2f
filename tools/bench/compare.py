"""`trimtab bench compare BASE`: check whether the working tree is slower than another commit.

The tests run first and must pass: the speed of incorrect code means nothing. Then BASE is checked out in a
worktree, and both versions decode the same prompts in separate processes, in turn: one plain request, one
steered request with three branches, and a batch of steered requests. A case is slower when the median of the
per-round ratios and the difference in milliseconds per token both exceed their thresholds; then the exit
status is 1.
"""

from __future__ import annotations

import shlex
import subprocess
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ...engine.config import DTYPES
from ...engine.utils.fields import config_field, validate_rules, validate_types
from ...engine.utils.json import dumps
from ...kernels.common.errors import InputError, RunError
from ..cli import flags
from ..cli.terminal import log_line
from ..common import environment, statistics
from .peers import OBJECTIVES, QUESTION_TEMPLATE
from .runners.process import RunnerProcess
from .worktree import link_side_by_side, resolve_commit

if TYPE_CHECKING:
    import argparse
    from pathlib import Path

    from ..cli.parser import Parser
    from .runners.competitors import Prompts

EXIT_SLOWER = 1
"""The exit status when a case is slower."""
STDERR_FD = 2


@dataclass(frozen=True)
class BenchCase:
    """One measured case: a variant, as the trimtab runner names it, and the number of requests at once."""

    name: str
    variant: str
    num_requests: int


@dataclass(frozen=True)
class CompareConfig:
    """Settings of the measurement, and the thresholds."""

    model: str = config_field("demo", "'demo', a folder or a .gguf file")
    dtype: str = config_field("bfloat16", "type of the weights", DTYPES[1:])
    output_len: int = config_field(32, "tokens of each answer, at least 2")
    batch_size: int = config_field(8, "requests in the batched case, up to 90")
    rounds: int = config_field(7, "measured rounds, after one warm-up round")
    relative: float = config_field(0.05, "allowed slowdown, as a fraction")
    absolute_ms: float = config_field(0.5, "allowed slowdown in ms per token; slower exceeds both")
    tests: str = config_field("./tools/test", "command that must succeed first, run in the repository root")

    def __post_init__(self) -> None:
        validate_types(self)
        validate_rules(
            self,
            ("output_len", self.output_len >= 2, "at least 2"),
            ("batch_size", 1 <= self.batch_size <= 90, "an integer from 1 to 90"),
            ("rounds", self.rounds >= 1, "an integer ≥ 1"),
            ("relative", self.relative >= 0, "a number ≥ 0"),
            ("absolute_ms", self.absolute_ms >= 0, "a number ≥ 0"),
            ("tests", bool(self.tests.strip()), "a command; untested code is not compared"),
        )

    @property
    def cases(self) -> tuple[BenchCase, ...]:
        """One plain request, one steered request, and a batch of steered requests."""
        return (
            BenchCase("base", "base", 1),
            BenchCase("mato", "mato", 1),
            BenchCase(f"{self.batch_size} x mato", "mato", self.batch_size),
        )


@dataclass(frozen=True)
class Comparison:
    """Milliseconds per token of both commits, the per-round ratios this / base, and the verdict."""

    candidate: list[float]
    baseline: list[float]
    rel_threshold: float
    abs_threshold_ms: float

    @property
    def ratios(self) -> list[float]:
        return [a / b for a, b in zip(self.candidate, self.baseline, strict=True)]

    @property
    def is_slower(self) -> bool:
        """Whether both thresholds are exceeded."""
        slowdown_ms = statistics.median(self.candidate) - statistics.median(self.baseline)
        return statistics.median(self.ratios) > 1 + self.rel_threshold and slowdown_ms > self.abs_threshold_ms


def add_arguments(parser: Parser) -> None:
    parser.add_argument("base", metavar="BASE", help="the other commit, such as HEAD~1 or main")
    flags.add_fields(parser, "comparison", CompareConfig)


def run(args: argparse.Namespace) -> int:
    """Return 1 if any case is slower, else 0. Raises RunError when the tests fail."""
    config, root = CompareConfig(**flags.fields_from_args(CompareConfig, args)), environment.ROOT
    base_commit = resolve_commit(root, args.base)
    this_commit = str(environment.get_commit(root))
    if this_commit.endswith("-dirty"):
        log_line("the working tree has uncommitted changes; they are measured, too")
    _run_tests(config.tests, root)
    with link_side_by_side(root, base_commit) as (candidate_path, baseline_path):
        comparisons = _measure(config, root, candidate_path, baseline_path)
    for name, comparison in comparisons.items():
        base_text = f"{statistics.format_number(statistics.median(comparison.baseline))} at {base_commit[:9]}"
        print(
            statistics.format_row(
                f"{name}, ms/token", f"{statistics.format_spread(comparison.candidate)}, {base_text}"
            )
        )
        suffix = ": slower" if comparison.is_slower else ""
        print(
            statistics.format_row("  this / base", f"{statistics.format_spread(comparison.ratios)}{suffix}")
        )
    slower = [name for name, verdict in comparisons.items() if verdict.is_slower]
    raw = {
        name: {"this": v.candidate, "base": v.baseline, "ratios": v.ratios} for name, v in comparisons.items()
    }
    metadata = {
        "bench": "compare",
        "config": asdict(config),
        **environment.run_metadata(),
        "base": base_commit,
    }
    print(dumps({**metadata, "slower": slower, "raw": raw}))
    return EXIT_SLOWER if slower else 0


def _run_tests(command: str, root: Path) -> None:
    """Run the tests. Their output goes to stderr, because stdout must end with JSON."""
    log_line(f"running the tests: {command}")
    try:
        argv = shlex.split(command)
        result = subprocess.run(argv, cwd=root, stdout=STDERR_FD, check=False)
    except (OSError, ValueError) as error:
        raise InputError(f"tests is {command!r}, which cannot be run: {error}") from None
    if result.returncode:
        raise RunError(
            f"the tests failed ({command!r}: exit status {result.returncode}); nothing is compared"
        )


def _measure(
    config: CompareConfig, root: Path, candidate_path: Path, baseline_path: Path
) -> dict[str, Comparison]:
    engine_options: dict[str, Any] = {"model": config.model, "dtype": config.dtype, "wishes": OBJECTIVES}
    num_rows = config.batch_size * (1 + len(OBJECTIVES))
    questions = [QUESTION_TEMPLATE.format(10 + index) for index in range(config.batch_size)]
    comparisons = {m.name: Comparison([], [], config.relative, config.absolute_ms) for m in config.cases}
    with (
        RunnerProcess("trimtab", module_path=candidate_path) as candidate,
        RunnerProcess("trimtab", module_path=baseline_path) as baseline,
    ):
        for worker, expected in ((candidate, root), (baseline, baseline_path / "trimtab")):
            package = worker.request("open", **engine_options, rows=num_rows)["about"]["package"]
            if package != str(expected.resolve()):
                raise RunError(f"Python imported {package}, not {expected.resolve()}")
        prompts: Prompts = candidate.request("render", prompts=questions)["prompts"]
        for index in range(config.rounds + 1):
            log_line(f"round {index} of {config.rounds}" if index else "warming up")
            for bench_case in config.cases:
                comparison = comparisons[bench_case.name]
                order = [(candidate, comparison.candidate), (baseline, comparison.baseline)]
                for worker, values in order if index % 2 else reversed(order):
                    elapsed_ms = _time_run(worker, bench_case, prompts, config.output_len)
                    if index:
                        values.append(elapsed_ms)
    return comparisons


def _time_run(worker: RunnerProcess, bench_case: BenchCase, prompts: Prompts, num_tokens: int) -> float:
    """Milliseconds per output token of each request, prefill included."""
    batch = prompts[: bench_case.num_requests]
    reply = worker.request("run", contestant=bench_case.variant, prompts=batch, tokens=num_tokens)
    return 1e3 * float(reply["seconds"]) / num_tokens
