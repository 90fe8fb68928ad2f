"""The Python programs in README.md and CONTRIBUTING.md run unchanged."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import httpx2 as httpx
import pytest

from .engine.server.server_process import run_server

README = Path(__file__).parent.parent / "README.md"
CONTRIBUTING = README.with_name("CONTRIBUTING.md")
PROGRAMS = [
    program
    for page in (README, CONTRIBUTING)
    for program in re.findall(
        r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    )
]
SERVICE = "# service.py"
CLIENT = "from openai"


def program_starting_with(start: str) -> str:
    """The only program that starts with `start`."""
    (program,) = [each for each in PROGRAMS if each.startswith(start)]
    return program


@pytest.mark.parametrize("text", [each for each in PROGRAMS if not each.startswith((SERVICE, CLIENT))])
def test_the_readme_program_prints_an_answer(text: str, tiny_folder: Path) -> None:
    """Uses the tiny model instead of the demo, because it loads faster."""
    text = text.replace('"demo"', repr(str(tiny_folder)))
    result = subprocess.run(
        [sys.executable, "-c", text], capture_output=True, text=True, check=False, timeout=120
    )
    assert result.returncode == 0, result.stderr
    assert len(result.stdout) > 20


@pytest.mark.long
def test_the_readme_client_steers_with_one_extra_key(demo_folder: Path) -> None:
    with run_server("--dtype", "bfloat16") as server:
        text = program_starting_with(CLIENT).replace("http://127.0.0.1:8000", server.url)
        result = subprocess.run(
            [sys.executable, "-c", text], capture_output=True, text=True, check=False, timeout=60
        )
    assert result.returncode == 0, result.stderr
    assert re.search(r"\[0\.\d+, 0\.\d+\]$", result.stdout)


def test_the_readme_engine_runs_inside_a_custom_service(demo_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "service.py").write_text(program_starting_with(SERVICE))
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "uvicorn", "service:app", "--port", str(port), "--log-level", "error"]
    with subprocess.Popen(command, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(tmp_path)}) as service:
        try:
            for _ in range(300):
                try:
                    body = {"text": "What is rain?", "kindness": 0.7}
                    response = httpx.post(f"http://127.0.0.1:{port}/answer", json=body, timeout=60)
                    break
                except httpx.ConnectError:
                    time.sleep(0.1)
            assert response.status_code == 200
            assert response.json()["answer"]
            assert len(response.json()["weights"]) == 2
        finally:
            service.terminate()
