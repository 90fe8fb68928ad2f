"""`trimtab serve` as a process: disconnects, shutdown and startup failures."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx2 as httpx
import pytest
from trimtab.tools.bench.http.load_swarm import run_swarm

from ...helpers.polling import wait_until
from .server_process import ServerProcess, run_server

LONG = {
    "messages": [{"role": "user", "content": "Why?"}],
    "max_tokens": 400,
    "ignore_eos": True,
    "steering": {"objectives": ["Be kind.", "Be brief."]},
    "logit_bias": {"5": 50},
}


@pytest.fixture(scope="module")
def server(tiny_folder: Path) -> Iterator[ServerProcess]:
    with run_server("--model", str(tiny_folder), "--kv-cache-memory", "4MiB") as server:
        yield server


def is_idle(server: ServerProcess) -> bool:
    return (server.metric("num_requests_running"), server.metric("kv_cache_usage_perc")) == (0, 0)


@pytest.mark.parametrize("stream", [True, False])
def test_a_disconnecting_client_aborts_its_request(server: ServerProcess, stream: bool) -> None:
    before = server.metric("generation_tokens_total")
    host, port = server.url.removeprefix("http://").split(":")
    body = json.dumps({**LONG, "stream": stream}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    with socket.create_connection((host, int(port))) as client:
        client.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        wait_until(lambda: server.metric("num_requests_running") == 1)
    wait_until(lambda: is_idle(server))
    wait_until(lambda: any('"status": 499' in line for line in server.log))
    assert server.metric("generation_tokens_total") - before < 400


def test_many_disconnecting_clients_do_not_disturb_others(server: ServerProcess) -> None:
    port = int(server.url.rpartition(":")[2])
    ends = Counter(end for end, _ in asyncio.run(run_swarm(port, 200, 12, leave_seed=1)))
    assert ends == {"done": 133, "left": 67}
    wait_until(lambda: is_idle(server))


def test_the_log_has_one_line_per_request_and_no_prompt(server: ServerProcess) -> None:
    server.post(
        "/v1/chat/completions", {**LONG, "max_tokens": 3, "messages": [{"role": "user", "content": "x7x"}]}
    )
    server.post("/v1/chat/completions", {**LONG, "messages": [{"role": "x7x"}], "temperature": -1})
    server.post("/v1/chat/completions", {**LONG, "messages": [{"role": "user", "content": {"x7x": 1}}]})
    wait_until(lambda: any('"status": 400' in line for line in server.log))
    lines = [json.loads(line) for line in server.log if line.startswith("{")]
    good = next(line for line in lines if line["status"] == 200)
    assert {"time", "id", "method", "branches", "prompt_tokens", "tokens", "seconds", "queue"} <= set(good)
    assert not any("x7x" in line or "Traceback" in line for line in server.log)


def test_sigterm_finishes_running_answers_and_refuses_new_ones(tiny_folder: Path) -> None:
    with run_server("--model", str(tiny_folder), "--log-prompts") as server:
        with httpx.stream(
            "POST", f"{server.url}/v1/chat/completions", json={**LONG, "stream": True}
        ) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line.startswith("data: ")]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        server.process.wait(30)
        with pytest.raises(httpx.ConnectError):
            server.get("/health")
        wait_until(lambda: any("Why?" in line for line in server.log))
        assert not any("Traceback" in line for line in server.log)


def test_answers_still_running_after_the_drain_timeout_are_aborted(tiny_folder: Path) -> None:
    with run_server("--model", str(tiny_folder), "--drain-timeout", "0") as server:
        with httpx.stream(
            "POST", f"{server.url}/v1/chat/completions", json={**LONG, "n": 30, "stream": True}, timeout=30
        ) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line.startswith("data: ")]
            assert "the server is shutting down" in rest[-2]
            server.process.wait(30)
        assert not any("Traceback" in line for line in server.log)


def run_failing_server(*arguments: str, **environment: str) -> tuple[int, str]:
    ended = subprocess.run(
        [sys.executable, "-m", "trimtab", "serve", *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )
    assert ended.stderr.count("\n") == 1, ended.stderr
    return ended.returncode, ended.stderr


def test_a_startup_failure_is_one_error_line(tiny_folder: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        status, message = run_failing_server("--port", str(taken.getsockname()[1]))
        assert (status, "ddress already in use" in message) == (1, True)
    assert run_failing_server("--port", "99999") == (
        2,
        "trimtab: port is 99999; it must be from 0 to 65535\n",
    )
    (tmp_path / "p.toml").write_text("[a]\nobjectives = 5\n")
    status, message = run_failing_server(
        "--port", "0", "--model", str(tiny_folder), "--profiles", str(tmp_path / "p.toml")
    )
    assert (status, "profile 'a'" in message) == (2, True)


def test_the_api_key_may_come_from_the_environment(tiny_folder: Path) -> None:
    with run_server("--model", str(tiny_folder), TRIMTAB_API_KEY="hush") as server:
        assert server.get("/v1/models").status_code == 401
        headers = {"Authorization": "Bearer hush"}
        assert httpx.get(f"{server.url}/v1/models", headers=headers).status_code == 200
        wrong = {"Authorization": "Bearer hush2"}
        assert httpx.post(f"{server.url}/v1/chat/completions", headers=wrong, json=LONG).status_code == 401
        assert httpx.post(f"{server.url}/v1/chat/completions", headers=headers, json={}).status_code == 400
        wait_until(lambda: any('"status": 400' in line for line in server.log))
        assert not any("hush" in line for line in server.log)


def test_a_log_that_nobody_reads_does_not_stop_the_server(tiny_folder: Path, tmp_path: Path) -> None:
    errors = tmp_path / "errors"
    read_fd, write_fd = os.pipe()  # a pipe that is never read
    command = [sys.executable, "-m", "trimtab", "serve", "--port", "0", "--model", str(tiny_folder)]
    with errors.open("w") as stderr:
        process = subprocess.Popen(command, stdout=write_fd, stderr=stderr, text=True)
    try:
        wait_until(lambda: "serving" in errors.read_text())
        url = errors.read_text().split(" at ")[1].split(";")[0]
        with httpx.Client(timeout=20) as client:
            for _ in range(700):  # their log lines are more than a pipe holds
                assert client.post(f"{url}/v1/chat/completions", json={"messages": 5}).status_code == 400
            assert client.get(f"{url}/health").status_code == 200
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 128 + signal.SIGTERM
    finally:
        process.kill()
        process.wait()
        os.close(read_fd)
        os.close(write_fd)


def test_a_closed_log_is_said_once(tiny_folder: Path, tmp_path: Path) -> None:
    errors = tmp_path / "errors"
    read_fd, write_fd = os.pipe()
    command = [sys.executable, "-m", "trimtab", "serve", "--port", "0", "--model", str(tiny_folder)]
    with errors.open("w") as stderr:
        process = subprocess.Popen(command, stdout=write_fd, stderr=stderr, text=True)
    os.close(write_fd)
    os.close(read_fd)
    try:
        wait_until(lambda: "serving" in errors.read_text())
        url = errors.read_text().split(" at ")[1].split(";")[0]
        for _ in range(5):
            assert httpx.post(f"{url}/v1/chat/completions", json={"messages": 5}).status_code == 400
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 128 + signal.SIGTERM
    finally:
        process.kill()
        process.wait()
    assert errors.read_text().count("the log cannot be written") == 1
    assert "Traceback" not in errors.read_text()


@pytest.mark.parametrize(("host", "addresses"), [("::1", ["[::1]"]), ("::", ["[::1]", "127.0.0.1"])])
def test_the_server_listens_on_ipv6(host: str, addresses: list[str], tiny_folder: Path) -> None:
    if not socket.has_ipv6:
        pytest.skip("this machine has no IPv6")
    with run_server("--model", str(tiny_folder), "--host", host) as server:
        port = server.url.rpartition(":")[2]
        assert server.url == f"http://[{host}]:{port}"
        for address in addresses:
            assert httpx.get(f"http://{address}:{port}/health").status_code == 200


def test_a_key_with_a_newline_is_the_key_without_it(tiny_folder: Path) -> None:
    with run_server("--model", str(tiny_folder), TRIMTAB_API_KEY="secret\n") as server:
        headers = {"Authorization": "Bearer secret"}
        assert httpx.get(f"{server.url}/v1/models", headers=headers).status_code == 200
        assert httpx.get(f"{server.url}/v1/models").status_code == 401
