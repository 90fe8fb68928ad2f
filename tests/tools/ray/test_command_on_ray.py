"""`trimtab serve --ray` as a separate process, stopped by SIGTERM."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("ray", reason="Ray is not installed")

import httpx2 as httpx

pytestmark = pytest.mark.long
LONG = {
    "messages": [{"role": "user", "content": "Why?"}],
    "max_tokens": 300,
    "ignore_eos": True,
    "stream": True,
}


def test_sigterm_lets_a_running_stream_finish(tiny_folder: Path) -> None:
    command = ["serve", "--ray", "--port", "0", "--model", str(tiny_folder), "--kv-cache-memory", "2MiB"]
    process = subprocess.Popen(
        [sys.executable, "-m", "trimtab", *command], stderr=subprocess.PIPE, text=True, env={**os.environ}
    )
    try:
        assert process.stderr is not None
        match = None
        while match is None and (line := process.stderr.readline()):
            match = re.search(r"serving .* at (http://\S+);", line)
        assert match is not None
        url = f"{match.group(1)}/v1/chat/completions"
        with httpx.stream("POST", url, json=LONG, timeout=300) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line.startswith("data: ")]
        assert rest[-1] == "data: [DONE]"
        assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        assert process.wait(120) == 143
    finally:
        process.kill()
        process.wait()
