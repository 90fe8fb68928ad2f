"""Run `trimtab serve` in a subprocess."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import httpx2 as httpx


@dataclass
class ServerProcess:
    """A running server: its URL, process and log lines."""

    url: str
    process: subprocess.Popen[str]
    log: list[str] = field(default_factory=list)

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=60)

    def post(self, path: str, body: object) -> httpx.Response:
        return httpx.post(self.url + path, json=body, timeout=60)

    def metric(self, name: str) -> float:
        """The value of a metric without labels."""
        match = re.search(rf"^trimtab:{name} (\S+)$", self.get("/metrics").text, re.MULTILINE)
        assert match, name
        return float(match.group(1))

    def stop(self) -> int:
        """Send SIGTERM and return the exit status."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(60)


@contextmanager
def run_server(*args: str, **env: str) -> Iterator[ServerProcess]:
    """Start a server on a free port and wait until it serves."""
    process = subprocess.Popen(
        [sys.executable, "-m", "trimtab", "serve", "--port", "0", *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, **env},
    )
    log: list[str] = []
    try:
        assert process.stdout is not None
        for line in process.stdout:
            log.append(line)
            if match := re.search(r"serving .* at (http://\S+);", line):
                break
        else:
            raise AssertionError("".join(log))
        threading.Thread(target=lambda: log.extend(process.stdout or ()), daemon=True).start()
        yield ServerProcess(match.group(1), process, log)
    finally:
        process.kill()
        process.wait()
