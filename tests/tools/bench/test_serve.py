"""`trimtab bench serve` against a real server of the tiny model."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from trimtab.tools.bench.serve import ServeConfig

from ...engine.server.server_process import ServerProcess, run_server
from ..conftest import CommandResult

Run = Callable[..., CommandResult]
OBJECTIVE_FLAGS = ("--prefer", "Be kind.=0.7", "--prefer", "Be brief.=0.3", "--max-gain", "5")


@pytest.fixture(scope="module")
def server(tiny_folder: Path) -> Iterator[ServerProcess]:
    with run_server("--model", str(tiny_folder), "--kv-cache-memory", "8MiB", "--api-key", "hush") as server:
        yield server


@pytest.fixture
def run_serve_bench(run: Run, server: ServerProcess) -> Callable[..., Any]:
    """Runs the bench and returns the JSON of its last line."""

    def command(*words: str) -> Any:
        ran = run("bench", "serve", "--base-url", server.url, "--api-key", "hush", *words)
        assert ran.status == 0, ran.stderr
        return json.loads(ran.stdout.splitlines()[-1])

    return command


def test_plain_and_steered_chats_are_answered_and_counted(
    run_serve_bench: Callable[..., Any],
) -> None:
    report = run_serve_bench(
        "--num-prompts",
        "6",
        "--input-len",
        "4",
        "--output-len",
        "5",
        "--steered-share",
        "0.5",
        *OBJECTIVE_FLAGS,
    )
    assert (report["completed"], report["failed"], report["steered"]) == (6, 0, 3)
    assert report["total_output_tokens"] == 6 * 5
    assert report["total_input_tokens"] == sum(answer["prompt_tokens"] for answer in report["raw"]) > 6 * 4
    assert report["output_throughput"] == pytest.approx(30 / report["duration"])
    for name in ("ttft", "tpot", "itl", "e2el"):
        assert 0 < report[f"median_{name}_ms"] <= report[f"p99_{name}_ms"]
    steered = [answer["end"] - answer["start"] for answer in report["raw"] if answer["steered"]]
    assert report["steered_requests"]["mean_e2el_ms"] == pytest.approx(1e3 * statistics.fmean(steered))
    assert report["method"]["max_gain"] == 5
    assert "hush" not in json.dumps(report)


def test_max_concurrency_limits_concurrent_requests(run_serve_bench: Callable[..., Any]) -> None:
    args = ("--num-prompts", "5", "--input-len", "3", "--output-len", "4", "--max-concurrency", "2")
    report = run_serve_bench("--endpoint", "/v1/completions", *args)
    assert (report["completed"], report["steered"]) == (5, 0)
    spans = [(answer["start"], answer["end"]) for answer in report["raw"]]
    assert max(sum(start <= at < end for start, end in spans) for at, _ in spans) == 2


def test_an_unreachable_or_refusing_server_is_a_run_error(run: Run, server: ServerProcess) -> None:
    ran = run("bench", "serve", "--base-url", "http://127.0.0.1:9", "--num-prompts", "1")
    assert (ran.status, ran.stdout) == (1, "")
    assert "http://127.0.0.1:9 sent an incomplete answer" in ran.stderr
    ran = run("bench", "serve", "--base-url", server.url, "--api-key", "wrong")
    assert (ran.status, "the server answered 401" in ran.stderr) == (1, True)
    args = ("--num-prompts", "2", "--model", "gpt", "--api-key", "hush")
    ran = run("bench", "serve", "--base-url", server.url, *args)
    assert (ran.status, "all 2 requests failed: the server answered 404" in ran.stderr) == (1, True)


@pytest.mark.parametrize("burstiness", [1.0, 4.0])
def test_requests_arrive_at_the_requested_rate_with_gamma_gaps(burstiness: float) -> None:
    load = ServeConfig(num_prompts=20_001, request_rate=8.0, burstiness=burstiness)
    times = list(load.arrival_times(seed=3))
    gaps = [b - a for a, b in itertools.pairwise(times)]
    mean, deviation = statistics.fmean(gaps), statistics.stdev(gaps)
    assert times[0] == 0
    assert mean == pytest.approx(1 / 8, rel=0.03)
    assert deviation / mean == pytest.approx(1 / math.sqrt(burstiness), rel=0.05)
    assert times == list(load.arrival_times(seed=3)) != list(load.arrival_times(seed=4))


def test_an_infinite_rate_sends_all_requests_at_once() -> None:
    assert list(ServeConfig(num_prompts=3).arrival_times(seed=0)) == [0, 0, 0]
