"""`trimtab bench overhead`: CPU cost of the server over the engine, and behaviour with too many clients.

Cost: 16 streams of a MATO request with two objectives, in turn from an AsyncEngine in a separate process and
from a server; CPU seconds of the whole process, and of its main thread, which runs the event loop and not the
engine. Storm: three times 200 concurrent clients, a third of which disconnect at a random token. Overload:
200 clients against a server that decodes 16 requests and queues 16, compared with as many clients as just
fit. Client and server share the machine. `trimtab bench serve` measures any server from outside; this bench
starts the servers and reads the CPU time and memory of their processes from Linux's /proc.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...engine.utils.fields import config_field, validate_rules, validate_types
from ...engine.utils.json import dumps
from ...kernels.common.errors import RunError
from ..cli import flags
from ..common import environment
from ..common.statistics import format_row, format_spread
from .http.load_swarm import OBJECTIVES, run_swarm

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator

    from ..cli.parser import Parser

NUM_STREAMS, NUM_CLIENTS, NUM_STORMS = 16, 200, 3
ANSWER_TOKENS = 16
"""Tokens of an answer in the storm and the overload, where CPU cost is not measured."""
PROC_DIR = Path("/proc")


@dataclass(frozen=True)
class OverheadConfig:
    """The model to serve, and settings of the cost measurement."""

    model: str = config_field("demo", "'demo', a folder, or a .gguf file")
    tokens: int = config_field(64, "tokens of each answer in the cost measurement")
    rounds: int = config_field(5, "measured rounds, after one warm-up round")

    def __post_init__(self) -> None:
        validate_types(self)
        validate_rules(
            self,
            ("tokens", self.tokens >= 1, "an integer ≥ 1"),
            ("rounds", self.rounds >= 1, "an integer ≥ 1"),
        )


def add_arguments(parser: Parser) -> None:
    flags.add_fields(parser, "overhead", OverheadConfig)


def run(args: argparse.Namespace) -> int:
    """Measure and print. Raises InputError for an unknown model, RunError without /proc."""
    from ...models.loader.resolve import resolve_folder  # noqa: PLC0415 - imports torch, which --help does not need

    config = OverheadConfig(**flags.fields_from_args(OverheadConfig, args))
    if not PROC_DIR.joinpath("self/stat").exists():
        raise RunError("/proc is missing; this bench needs Linux, to read the CPU time of processes")
    resolve_folder(config.model)
    cost, storm, overload = _measure_cost(config), _run_storm(config), _run_overload(config)
    results = {"cost": cost, "storm": storm, "overload": overload}
    metadata = {
        "bench": "overhead",
        "config": {**asdict(config), "wishes": OBJECTIVES},
        **environment.run_metadata(),
    }
    print(dumps({**metadata, **results}))
    return 0


def _measure_cost(config: OverheadConfig) -> dict[str, list[float]]:
    """CPU seconds per round of the engine and the server, and the server's additional CPU time, in total and
    in its main thread, as fractions of the engine's."""
    samples: dict[str, list[float]] = {name: [] for name in ("engine", "server", "added", "loop")}
    with _engine_process(config) as (engine_pid, run_engine), _server_process(config) as (pid, port):
        for index in range(config.rounds + 1):
            engine_cpu, engine_loop_cpu = _cpu_seconds_during(engine_pid, run_engine)
            server_cpu, loop_cpu = _cpu_seconds_during(
                pid, lambda: asyncio.run(run_swarm(port, NUM_STREAMS, config.tokens))
            )
            if index:  # the first round warms up
                values = (
                    engine_cpu,
                    server_cpu,
                    server_cpu / engine_cpu - 1,
                    (loop_cpu - engine_loop_cpu) / engine_cpu,
                )
                for name, value in zip(samples, values, strict=True):
                    samples[name].append(value)
    print(format_row(f"{NUM_STREAMS} streams, CPU seconds of the engine", format_spread(samples["engine"])))
    print(format_row("  of the server", format_spread(samples["server"])))
    print(format_row("  added by the server, fraction", format_spread(samples["added"])))
    print(format_row("  of which in its main thread", format_spread(samples["loop"])))
    return samples


def _run_storm(config: OverheadConfig) -> dict[str, Any]:
    with _server_process(config) as (pid, port):
        rss_mib, outcomes = [], Counter[str]()
        for seed in range(NUM_STORMS):
            outcomes += Counter(
                outcome for outcome, _ in asyncio.run(run_swarm(port, NUM_CLIENTS, ANSWER_TOKENS, seed))
            )
            while _read_metric(port, "num_requests_running"):
                time.sleep(0.05)
            rss_mib.append(_rss_mib(pid))
        kv_usage = _read_metric(port, "kv_cache_usage_perc")
    print(format_row(f"{NUM_STORMS} x {NUM_CLIENTS} clients", _format_counts(outcomes)))
    print(
        format_row(
            "  KV cache usage after all; MiB after each", f"{kv_usage}; {', '.join(map(str, rss_mib))}"
        )
    )
    return {"ends": outcomes, "pages_held": kv_usage, "memory": rss_mib}


def _run_overload(config: OverheadConfig) -> dict[str, Any]:
    with _server_process(config, "--max-waiting", str(NUM_STREAMS)) as (_, port):
        asyncio.run(run_swarm(port, NUM_STREAMS, ANSWER_TOKENS))
        running_latency = _max_latency(asyncio.run(run_swarm(port, NUM_STREAMS, ANSWER_TOKENS)))
        full_latency = _max_latency(asyncio.run(run_swarm(port, 2 * NUM_STREAMS, ANSWER_TOKENS)))
        outcomes = asyncio.run(run_swarm(port, NUM_CLIENTS, ANSWER_TOKENS))
    counts = Counter(outcome for outcome, _ in outcomes)
    results = {
        "running": running_latency,
        "full": full_latency,
        "overloaded": _max_latency(outcomes),
        "ends": counts,
    }
    print(
        format_row(
            f"{NUM_CLIENTS} clients, {NUM_STREAMS} decoded, {NUM_STREAMS} queued",
            _format_counts(counts),
        )
    )
    latency_text = (
        f"{results['overloaded']:.2f}; queue just full {full_latency:.2f}, empty {running_latency:.2f}"
    )
    print(format_row("  slowest answer, s", latency_text))
    return results


def _format_counts(counts: Counter[str]) -> str:
    return ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))


def _max_latency(outcomes: list[tuple[str, float]]) -> float:
    """Seconds of the slowest complete answer. Raises RunError if none is complete."""
    seconds = [seconds for end, seconds in outcomes if end == "done"]
    if not seconds:
        raise RunError(
            f"none of {len(outcomes)} clients got a complete answer; the first outcome is {outcomes[0][0]!r}"
        )
    return max(seconds)


@contextmanager
def _engine_process(config: OverheadConfig) -> Iterator[tuple[int, Callable[[], None]]]:
    """The pid of a baseline engine process, and a function that makes it run all streams once."""
    command = [sys.executable, "-m", "trimtab.tools.bench.engine_baseline"]
    argv = [*command, config.model, str(NUM_STREAMS), str(config.tokens)]
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        stdin, stdout = process.stdin, process.stdout

        def run_streams() -> None:
            print(file=stdin, flush=True)
            _require_line(stdout.readline(), "the engine")

        try:
            _require_line(stdout.readline(), "the engine")
            yield process.pid, run_streams
        finally:
            process.kill()


@contextmanager
def _server_process(config: OverheadConfig, *extra_args: str) -> Iterator[tuple[int, int]]:
    """The pid and the port of a new server."""
    command = [sys.executable, "-m", "trimtab", "serve", "--port", "0", "--dtype", "bfloat16"]
    argv = [*command, "--model", config.model, *extra_args]
    with subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as server:
        assert server.stderr is not None
        try:
            first_line = _require_line(server.stderr.readline(), "the server")
            port = first_line.partition(";")[0].rpartition(":")[2]
            if not port.isdecimal():
                raise RunError(f"the server did not start: {first_line.strip()}")
            yield server.pid, int(port)
        finally:
            server.kill()


def _require_line(text: str, process_name: str) -> str:
    if not text:
        raise RunError(f"{process_name}'s process ended early")
    return text


def _cpu_seconds_during(pid: int, call: Callable[[], object]) -> tuple[float, float]:
    """CPU seconds that a process, and its main thread, spend while `call` runs."""
    start = _cpu_seconds(f"{pid}"), _cpu_seconds(f"{pid}/task/{pid}")
    call()
    return _cpu_seconds(f"{pid}") - start[0], _cpu_seconds(f"{pid}/task/{pid}") - start[1]


def _cpu_seconds(proc_path: str) -> float:
    stat_fields = PROC_DIR.joinpath(proc_path, "stat").read_text().rpartition(")")[2].split()
    return (int(stat_fields[11]) + int(stat_fields[12])) / os.sysconf("SC_CLK_TCK")


def _rss_mib(pid: int) -> int:
    """MiB of anonymous resident memory."""
    status = PROC_DIR.joinpath(str(pid), "status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) >> 10


def _read_metric(port: int, name: str) -> float:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as response:
        text: str = response.read().decode()
    return float(text.partition(f"\ntrimtab:{name} ")[2].split()[0])
