"""Concurrent calls of many kinds, and signals during them and during startup."""

from __future__ import annotations

import json
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from ...helpers.polling import wait_until
from .server_process import ServerProcess, run_server

CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {
    "messages": [{"role": "user", "content": "Why?"}],
    "ignore_eos": True,
    "steering": {"objectives": ["Be kind.", "Be brief."]},
}


def send_call(client: httpx.Client, kind: str, tokens: int) -> str:
    """The outcome of a call: done, left, an HTTP status, or gone if the server has stopped."""
    body = {**BODY, "max_tokens": tokens, "stream": kind in ("streamed", "left")}
    try:
        if kind in ("/health", "/metrics"):
            return str(client.get(kind).status_code)
        if kind in ("full", "wrong"):
            response = client.post(CHAT, json=body if kind == "full" else {**body, "temperature": -1})
            return "done" if response.status_code == 200 else str(response.status_code)
        with client.stream("POST", CHAT, json=body) as answer:
            lines = [line for line in answer.iter_lines() if line] if kind == "streamed" else []
        if kind == "left" or answer.status_code != 200:
            return "left" if answer.status_code == 200 else str(answer.status_code)
        assert lines[-1] == "data: [DONE]"
        return "503" if "server is shutting down" in lines[-2] else "done"
    except httpx.TransportError:
        return "gone"


def send_mixed_calls(server: ServerProcess, seed: int, total: int) -> Counter[tuple[str, str]]:
    """Send calls of all kinds from sixteen threads and count their outcomes."""
    rng = random.Random(seed)
    kinds = ("full", "full", "streamed", "streamed", "left", "wrong", "/health", "/metrics")
    plans = [(rng.choice(kinds), rng.randint(1, 20)) for _ in range(total)]
    with httpx.Client(base_url=server.url, timeout=60) as client, ThreadPoolExecutor(16) as pool:
        ends = list(pool.map(lambda plan: send_call(client, *plan), plans, timeout=240))
    return Counter((kind, end) for (kind, _), end in zip(plans, ends, strict=True))


def test_concurrent_calls_of_all_kinds_are_served_and_counted_once(tiny_folder: Path) -> None:
    with run_server(
        "--model", str(tiny_folder), "--kv-cache-memory", "512KiB", "--block-size", "16"
    ) as server:
        ends = send_mixed_calls(server, 1, 80)
        expected = {"wrong": "400", "/health": "200", "/metrics": "200", "left": "left"}
        assert set(ends) == {(kind, expected.get(kind, "done")) for kind, _ in ends}
        end = time.monotonic() + 30
        while server.metric("num_requests_running") or server.metric("kv_cache_usage_perc"):
            assert time.monotonic() < end
        num_calls = sum(count for (kind, _), count in ends.items() if not kind.startswith("/"))
        while sum(line.startswith("{") for line in server.log) < num_calls:
            assert time.monotonic() < end
        lines = Counter(json.loads(line)["status"] for line in server.log if line.startswith("{"))
        metrics = server.get("/metrics").text
        refused = re.findall(
            r'^trimtab:request_refused_total\{status="(\d+)"\} (\S+)$', metrics, re.MULTILINE
        )
        assert {int(status): float(count) for status, count in refused} == {
            status: count for status, count in lines.items() if status != 200
        }
        assert lines[400] == ends["wrong", "400"]
        assert lines[200] >= ends["full", "done"] + ends["streamed", "done"]


@pytest.mark.parametrize(
    "signals",
    [
        [signal.SIGTERM],
        pytest.param([signal.SIGINT], marks=pytest.mark.long),
        pytest.param([signal.SIGTERM, signal.SIGINT], marks=pytest.mark.long),
    ],
)
def test_a_signal_during_concurrent_calls_ends_the_server_and_every_call(
    tiny_folder: Path, signals: list[signal.Signals]
) -> None:
    with run_server("--model", str(tiny_folder), "--drain-timeout", "1") as server:
        with ThreadPoolExecutor(1) as pool:
            calling = pool.submit(send_mixed_calls, server, 2, 80)
            wait_until(lambda: any(line.startswith("{") for line in server.log))
            for each in signals:
                server.process.send_signal(each)
            ends = calling.result(240)
        assert {"gone"} < {end for _, end in ends} <= {"done", "left", "400", "200", "503", "gone"}
        assert server.process.wait(30) in [128 + each for each in signals]
        assert not any("Traceback" in line for line in server.log), "".join(server.log)


@pytest.mark.parametrize("moment", [pytest.param(0.3, marks=pytest.mark.long), 1.0])
def test_ctrl_c_during_startup_leaves_no_traceback(tiny_folder: Path, moment: float) -> None:
    command = [sys.executable, "-m", "trimtab", "serve", "--port", "0", "--model", str(tiny_folder)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    time.sleep(moment)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode in (-signal.SIGINT, 128 + signal.SIGINT), stderr
