"""Contestants in processes of their own, on the tiny model."""

from __future__ import annotations

import importlib.util
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from trimtab import InputError
from trimtab.kernels.common.errors import RunError
from trimtab.kernels.steering.closed_form import strength
from trimtab.tools.bench.runners import transformers
from trimtab.tools.bench.runners.competitors import (
    COMPETITORS,
    RATIOS,
    CompetitorResult,
    SpeedRatio,
    compute_ratio,
    token_match_rate,
)
from trimtab.tools.bench.runners.process import MissingPackageError, RunnerProcess

from ..conftest import CommandResult

OBJECTIVES = [("Be kind.", 0.7), ("Be brief.", 0.3)]
TOKENS = 8


@dataclass(frozen=True)
class WorkerPair:
    """trimtab and transformers at work on one model, and the branches of a prompt."""

    ours: RunnerProcess
    theirs: RunnerProcess
    prompts: list[list[list[int]]]

    def tokens(self, worker: RunnerProcess, contestant: str, prompts: int = 1) -> list[list[int]]:
        answer = worker.request("run", contestant=contestant, prompts=self.prompts[:prompts], tokens=TOKENS)
        assert answer["seconds"] > 0
        found: list[list[int]] = answer["token_ids"]
        return found


@pytest.fixture(scope="module")
def worker_pair(tiny_folder: Path) -> Iterator[WorkerPair]:
    with RunnerProcess("trimtab") as ours, RunnerProcess("transformers") as theirs:
        options = {"dtype": "float32", "wishes": OBJECTIVES, "rows": 6}
        about = ours.request("open", model=str(tiny_folder), **options)["about"]
        theirs.request("open", **options, **about, folder=str(tiny_folder))
        yield WorkerPair(
            ours, theirs, ours.request("render", prompts=["Why?", "Is it so, and why?"])["prompts"]
        )


def process_state(process: int) -> str:
    """What a process does, in Linux's letters: T is stopped."""
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.mark.parametrize(
    ("mine", "other", "prompts"), [("base", "plain", 2), ("guidance", "guidance", 1), ("amulet", "amulet", 1)]
)
def test_equivalent_competitors_generate_the_same_tokens(
    worker_pair: WorkerPair, mine: str, other: str, prompts: int
) -> None:
    found = worker_pair.tokens(worker_pair.ours, mine, prompts)
    assert len(found) == prompts
    assert all(len(ids) == TOKENS for ids in found)
    assert worker_pair.tokens(worker_pair.theirs, other, prompts) == found


def test_a_worker_is_stopped_between_its_turns(worker_pair: WorkerPair) -> None:
    worker_pair.tokens(worker_pair.ours, "mato sampled")
    workers = (worker_pair.ours, worker_pair.theirs)
    end = time.monotonic() + 10
    while [process_state(worker._process.pid) for worker in workers] != ["T", "T"]:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_an_unsupported_task_is_a_failed_run_and_the_worker_lives_on(worker_pair: WorkerPair) -> None:
    with pytest.raises(RunError, match="trimtab failed: KeyError: 'conjuring'"):
        worker_pair.tokens(worker_pair.ours, "conjuring")
    assert worker_pair.tokens(worker_pair.ours, "base") == worker_pair.tokens(worker_pair.theirs, "plain")


def test_a_package_that_is_not_there_is_named() -> None:
    if importlib.util.find_spec("llama_cpp"):
        pytest.skip("llama-cpp-python is installed here")
    missing = pytest.raises(MissingPackageError, match="its Python has no package llama_cpp")
    with RunnerProcess("llama_cpp") as worker, missing:
        worker.request("open", gguf="x", length=1)


def test_a_worker_that_dies_is_quoted(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho one >&2\necho no room here >&2\nexit 3\n")
    python.chmod(0o755)
    with (
        RunnerProcess("vllm", str(python)) as worker,
        pytest.raises(RunError, match="vllm ended: no room here"),
    ):
        worker.request("open")
    with pytest.raises(InputError, match="nowhere/python' cannot run vllm: No such file"):
        RunnerProcess("vllm", "nowhere/python")


def test_a_worker_ends_with_its_bench() -> None:
    with RunnerProcess("nobody") as worker:
        with pytest.raises(RunError, match="No such file"):
            worker.request("open")
        process = worker._process
    assert process.returncode is not None
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_the_unrolled_loop_gives_the_closed_form() -> None:
    base, anchor = torch.randn(2, 50, dtype=torch.float64, generator=torch.manual_seed(1)).log_softmax(-1)
    a = strength(transformers.ALPHA, transformers.LAM, transformers.ETA, transformers.NUM_STEPS)
    expected = (base + a * (anchor - base)).log_softmax(-1)
    torch.testing.assert_close(transformers.follow_the_leader(base, anchor), expected, atol=1e-12, rtol=0)


def test_ratios_are_taken_within_a_round_and_between_our_own_while_decoding() -> None:
    scores = {each.name: CompetitorResult(each, call_times=[2.0, 4.0]) for each in COMPETITORS}
    scores["transformers plain"].call_times = [6.0, 2.0]
    for name, tokens in (("trimtab base", [1, 2, 3]), ("transformers plain", [1, 2, 4])):
        scores[name].token_ids = [tokens, tokens[:1]]
    found = compute_ratio(RATIOS[0], scores)
    assert found == {"median": 1.75, "values": [3.0, 0.5], "equal": 0.75}
    scores["trimtab mato"].decode_times, scores["trimtab base"].decode_times = [1.0, 2.0], [3.0, 2.0]
    assert compute_ratio(SpeedRatio("trimtab mato", "trimtab base"), scores)["values"] == [3.0, 1.0]
    assert token_match_rate([[1, 2]], [[2, 2]]) == 0.5


def test_every_ratio_is_of_existing_competitors() -> None:
    names = {each.name for each in COMPETITORS}
    assert all({ratio.ours, ratio.theirs} <= names for ratio in RATIOS)


def test_peers_skips_by_name_what_is_not_there(run: Callable[..., CommandResult], tiny_folder: Path) -> None:
    few = ("--num-prompts", "1", "--rounds", "2", "--output-len", "3", "--dtype", "float32")
    skipped = ("--skip", "transformers", "--skip", "amulet", "--skip", "vllm")
    ran = run("bench", "peers", "--model", str(tiny_folder), *few, *skipped)
    assert ran.status == 0, ran.stderr
    found: Any = json.loads(ran.stdout.splitlines()[-1])
    assert "llama_cpp" in found["peers"]
    assert found["peers"]["trimtab"]["folder"] == str(tiny_folder)
    assert found["peers"]["llama_cpp"]["skipped"].startswith("it needs the model as a file")
    assert [len(score["whole"]) for score in found["raw"].values()] == [2] * 6
    assert set(found["ratios"]) == {
        "trimtab mato / trimtab base",
        "trimtab mato sampled / trimtab mato",
        "trimtab mato kl_budget=0.2 / trimtab mato",
    }
    assert ran.stderr.count("round") == 2
