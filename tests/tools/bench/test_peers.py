"""Runner processes and speed ratios of `trimtab bench peers`, on the tiny model."""

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

from ...helpers.tiny_model import VOCAB_SIZE, TinyModel
from ..conftest import CommandResult

OBJECTIVES = [("Be kind.", 0.7), ("Be brief.", 0.3)]
TOKENS = 8


@dataclass(frozen=True)
class WorkerPair:
    """Runners for trimtab and transformers with the same model, and the branches of the prompts."""

    ours: RunnerProcess
    theirs: RunnerProcess
    prompts: list[list[list[int]]]

    def tokens(self, worker: RunnerProcess, contestant: str, prompts: int = 1) -> list[list[int]]:
        answer = worker.request("run", contestant=contestant, prompts=self.prompts[:prompts], tokens=TOKENS)
        assert answer["seconds"] > 0
        token_ids: list[list[int]] = answer["token_ids"]
        return token_ids


@pytest.fixture(scope="module")
def worker_pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WorkerPair]:
    # every row of the embedding has a token: trimtab samples no others, transformers does
    folder = str(TinyModel(vocab_size=VOCAB_SIZE).write(tmp_path_factory.mktemp("peers")))
    with RunnerProcess("trimtab") as ours, RunnerProcess("transformers") as theirs:
        options = {"dtype": "float32", "wishes": OBJECTIVES, "rows": 6}
        about = ours.request("open", model=folder, **options)["about"]
        theirs.request("open", **options, **about, folder=folder)
        yield WorkerPair(
            ours, theirs, ours.request("render", prompts=["Why?", "Is it so, and why?"])["prompts"]
        )


def process_state(process: int) -> str:
    """The state of a process as in /proc; T is stopped."""
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.mark.parametrize(
    ("ours", "theirs", "prompts"),
    [("base", "plain", 2), ("guidance", "guidance", 1), ("amulet", "amulet", 1)],
)
def test_equivalent_competitors_generate_the_same_tokens(
    worker_pair: WorkerPair, ours: str, theirs: str, prompts: int
) -> None:
    token_ids = worker_pair.tokens(worker_pair.ours, ours, prompts)
    assert len(token_ids) == prompts
    assert all(len(ids) == TOKENS for ids in token_ids)
    assert worker_pair.tokens(worker_pair.theirs, theirs, prompts) == token_ids


def test_a_runner_is_stopped_between_its_turns(worker_pair: WorkerPair) -> None:
    worker_pair.tokens(worker_pair.ours, "mato sampled")
    workers = (worker_pair.ours, worker_pair.theirs)
    end = time.monotonic() + 10
    while [process_state(worker._process.pid) for worker in workers] != ["T", "T"]:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_runner_keeps_running_after_an_unsupported_variant(worker_pair: WorkerPair) -> None:
    with pytest.raises(RunError, match="trimtab failed: KeyError: 'conjuring'"):
        worker_pair.tokens(worker_pair.ours, "conjuring")
    assert worker_pair.tokens(worker_pair.ours, "base") == worker_pair.tokens(worker_pair.theirs, "plain")


def test_a_missing_package_is_named() -> None:
    if importlib.util.find_spec("llama_cpp"):
        pytest.skip("llama-cpp-python is installed here")
    missing = pytest.raises(MissingPackageError, match="its Python lacks the package llama_cpp")
    with RunnerProcess("llama_cpp") as worker, missing:
        worker.request("open", gguf="x", length=1)


def test_the_error_of_a_dead_runner_has_its_last_stderr_line(tmp_path: Path) -> None:
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


def test_a_runner_process_ends_with_its_context() -> None:
    with RunnerProcess("nobody") as worker:
        with pytest.raises(RunError, match="No such file"):
            worker.request("open")
        process = worker._process
    assert process.returncode is not None
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_the_literal_amulet_loop_matches_the_closed_form() -> None:
    base, anchor = torch.randn(2, 50, dtype=torch.float64, generator=torch.manual_seed(1)).log_softmax(-1)
    a = strength(transformers.ALPHA, transformers.LAM, transformers.ETA, transformers.NUM_STEPS)
    expected = (base + a * (anchor - base)).log_softmax(-1)
    torch.testing.assert_close(transformers.follow_the_leader(base, anchor), expected, atol=1e-12, rtol=0)


def test_ratios_are_per_round_and_use_decode_times_where_both_have_them() -> None:
    results = {each.name: CompetitorResult(each, call_times=[2.0, 4.0]) for each in COMPETITORS}
    results["transformers plain"].call_times = [6.0, 2.0]
    for name, tokens in (("trimtab base", [1, 2, 3]), ("transformers plain", [1, 2, 4])):
        results[name].token_ids = [tokens, tokens[:1]]
    ratio = compute_ratio(RATIOS[0], results)
    assert ratio == {"median": 1.75, "values": [3.0, 0.5], "equal": 0.75}
    results["trimtab mato"].decode_times, results["trimtab base"].decode_times = [1.0, 2.0], [3.0, 2.0]
    assert compute_ratio(SpeedRatio("trimtab mato", "trimtab base"), results)["values"] == [3.0, 1.0]
    assert token_match_rate([[1, 2]], [[2, 2]]) == 0.5


def test_every_ratio_compares_existing_competitors() -> None:
    names = {each.name for each in COMPETITORS}
    assert all({ratio.ours, ratio.theirs} <= names for ratio in RATIOS)


def test_peers_lists_skipped_contestants(run: Callable[..., CommandResult], tiny_folder: Path) -> None:
    small = ("--num-prompts", "1", "--rounds", "2", "--output-len", "3", "--dtype", "float32")
    skipped = ("--skip", "transformers", "--skip", "amulet", "--skip", "vllm")
    ran = run("bench", "peers", "--model", str(tiny_folder), *small, *skipped)
    assert ran.status == 0, ran.stderr
    report: Any = json.loads(ran.stdout.splitlines()[-1])
    assert "llama_cpp" in report["peers"]
    assert report["peers"]["trimtab"]["folder"] == str(tiny_folder)
    assert report["peers"]["llama_cpp"]["skipped"].startswith("it needs a GGUF file")
    assert [len(score["whole"]) for score in report["raw"].values()] == [2] * 6
    assert set(report["ratios"]) == {
        "trimtab mato / trimtab base",
        "trimtab mato sampled / trimtab mato",
        "trimtab mato kl_budget=0.2 / trimtab mato",
    }
    assert ran.stderr.count("round") == 2
