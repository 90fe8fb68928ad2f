"""`trimtab generate --ray`, with the tiny model in several processes."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray", reason="Ray is not installed")

from trimtab.tools.cli.parser import Parser
from trimtab.tools.commands import generate
from trimtab.tools.ray import batch
from trimtab.tools.ray.config import RayConfig

from .slow_engine import ray_cluster, slow_engine_factory

pytestmark = pytest.mark.long
LINES = 40
BAD_LINE = 7
"""Number of the invalid line in each file."""


@pytest.fixture(scope="module", autouse=True)
def one_cluster() -> Iterator[None]:
    with ray_cluster():
        yield


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path, Path]:
    """Folders of prompts, answers, and pids of the engines."""
    source, target, pids = (tmp_path / name for name in ("in", "out", "pids"))
    source.mkdir()
    pids.mkdir()
    for name in ("a", "b"):
        lines = [json.dumps({"prompt": f"{name}{index}", "id": index}) for index in range(1, LINES + 1)]
        lines[BAD_LINE - 1] = "{"
        (source / f"{name}.jsonl").write_text("\n".join(lines))
    return source, target, pids


def run_batch(model: Path, folders: tuple[Path, Path, Path], seconds: float) -> int:
    source, target, pids = folders
    parser = Parser("trimtab generate", "Test.")
    generate.add_arguments(parser)
    flags = ["--input", str(source), "--output", str(target), "--model", str(model), "--max-tokens", "6"]
    args = parser.parse_argv([*flags, "--max-num-seqs", "8"])
    engine = slow_engine_factory(
        model, seconds, pids, kv_cache_memory="2MiB", max_num_seqs=8, max_waiting=1 << 20
    )
    return batch.run(args, RayConfig(ray=True, replicas="2"), engine)


def answers_by_line(target: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """The answers by file and line, without duplicates."""
    lines = [(file.name, json.loads(each)) for file in target.iterdir() for each in file.open()]
    answers = {(name, line["line"]): line for name, line in lines}
    assert len(answers) == len(lines)
    return answers


def kill_one_engine(pids: Path, target: Path, killed: list[int]) -> None:
    """Kill an engine's process when the first answers are written."""
    end = time.monotonic() + 500
    while time.monotonic() < end and not (target.exists() and any(target.iterdir())):
        time.sleep(0.05)
    first = int(next(pids.iterdir()).name)
    os.kill(first, signal.SIGKILL)
    killed.append(first)


def test_each_line_has_one_answer_after_an_engine_is_killed(
    folders: tuple[Path, Path, Path], tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, target, pids = folders
    killed: list[int] = []
    killer = threading.Thread(target=kill_one_engine, args=(pids, target, killed))
    killer.start()
    assert run_batch(tiny_folder, folders, seconds=0.1) == 1
    killer.join()
    assert killed
    assert len(list(pids.iterdir())) >= 3  # two initial ones, and a replacement
    answers = answers_by_line(target)
    assert set(answers) == {(f"{name}.jsonl", line) for name in "ab" for line in range(1, LINES + 1)}
    assert [key for key, line in answers.items() if line.get("error")] == [
        key for key in answers if key[1] == BAD_LINE
    ]
    assert all(line["id"] == key[1] for key, line in answers.items() if key[1] != BAD_LINE)
    assert "answered 78 of 80 lines; 2 failed" in capsys.readouterr().err

    assert run_batch(tiny_folder, folders, seconds=0) == 1
    assert "every line of" in capsys.readouterr().err

    content = (target / "a.jsonl").read_bytes()
    (target / "a.jsonl").write_bytes(content[: len(content) // 2])
    before = content[: content.rindex(b"\n", 0, len(content) // 2) + 1]
    run_batch(tiny_folder, folders, seconds=0)
    assert (target / "a.jsonl").read_bytes().startswith(before)
    again = answers_by_line(target)
    assert {key: line.get("token_ids") for key, line in again.items()} == {
        key: line.get("token_ids") for key, line in answers.items()
    }
