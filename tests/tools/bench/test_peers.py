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
from trimtab.tools.bench.runners.competitors import CONTESTANTS, RATIOS, Ratio, Score, compared, equal_share
from trimtab.tools.bench.runners.process import MissingError, Worker

from ..conftest import Ran

WISHES = [("Be kind.", 0.7), ("Be brief.", 0.3)]
TOKENS = 8


@dataclass(frozen=True)
class Pair:
    """trimtab and transformers at work on one model, and the branches of a prompt."""

    ours: Worker
    theirs: Worker
    prompts: list[list[list[int]]]

    def tokens(self, worker: Worker, contestant: str, prompts: int = 1) -> list[list[int]]:
        answer = worker.ask("run", contestant=contestant, prompts=self.prompts[:prompts], tokens=TOKENS)
        assert answer["seconds"] > 0
        found: list[list[int]] = answer["token_ids"]
        return found


@pytest.fixture(scope="module")
def pair(tiny_folder: Path) -> Iterator[Pair]:
    with Worker("trimtab") as ours, Worker("transformers") as theirs:
        options = {"dtype": "float32", "wishes": WISHES, "rows": 6}
        about = ours.ask("open", model=str(tiny_folder), **options)["about"]
        assert about["folder"] == str(tiny_folder)
        theirs.ask("open", **options, **about)
        yield Pair(ours, theirs, ours.ask("render", prompts=["Why?", "Is it so, and why?"])["prompts"])


def state(process: int) -> str:
    """What a process does, in Linux's letters: T is stopped."""
    return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.mark.parametrize(
    ("mine", "other", "prompts"), [("base", "plain", 2), ("guidance", "guidance", 1), ("amulet", "amulet", 1)]
)
def test_contestants_that_do_the_same_choose_the_same_tokens(
    pair: Pair, mine: str, other: str, prompts: int
) -> None:
    found = pair.tokens(pair.ours, mine, prompts)
    assert len(found) == prompts
    assert all(len(ids) == TOKENS for ids in found)
    assert pair.tokens(pair.theirs, other, prompts) == found


def test_a_worker_stands_still_between_its_turns(pair: Pair) -> None:
    pair.tokens(pair.ours, "mato sampled")
    workers = (pair.ours, pair.theirs)
    end = time.monotonic() + 10
    while [state(worker._process.pid) for worker in workers] != ["T", "T"]:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_what_a_worker_cannot_do_is_a_failed_run_and_it_lives_on(pair: Pair) -> None:
    with pytest.raises(RunError, match="trimtab failed: KeyError: 'conjuring'"):
        pair.tokens(pair.ours, "conjuring")
    assert pair.tokens(pair.ours, "base") == pair.tokens(pair.theirs, "plain")


def test_a_package_that_is_not_there_is_named() -> None:
    if importlib.util.find_spec("llama_cpp"):
        pytest.skip("llama-cpp-python is installed here")
    missing = pytest.raises(MissingError, match="its Python has no package llama_cpp")
    with Worker("llama_cpp") as worker, missing:
        worker.ask("open", gguf="x", length=1)


def test_a_worker_that_dies_is_quoted(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho one >&2\necho no room here >&2\nexit 3\n")
    python.chmod(0o755)
    with Worker("vllm", str(python)) as worker, pytest.raises(RunError, match="vllm ended: no room here"):
        worker.ask("open")
    with pytest.raises(InputError, match="nowhere/python' cannot run vllm: No such file"):
        Worker("vllm", "nowhere/python")


def test_a_worker_ends_with_its_bench() -> None:
    with Worker("nobody") as worker:
        with pytest.raises(RunError, match="No such file"):
            worker.ask("open")
        process = worker._process
    assert process.returncode is not None
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_the_literal_loop_is_the_closed_form() -> None:
    base, anchor = torch.randn(2, 50, dtype=torch.float64, generator=torch.manual_seed(1)).log_softmax(-1)
    a = strength(transformers.ALPHA, transformers.LAM, transformers.ETA, transformers.STEPS)
    expected = (base + a * (anchor - base)).log_softmax(-1)
    torch.testing.assert_close(transformers.follow_the_leader(base, anchor), expected, atol=1e-12, rtol=0)


def test_ratios_are_taken_within_a_round_and_between_our_own_while_decoding() -> None:
    scores = {each.name: Score(each, whole=[2.0, 4.0]) for each in CONTESTANTS}
    scores["transformers plain"].whole = [6.0, 2.0]
    for name, tokens in (("trimtab base", [1, 2, 3]), ("transformers plain", [1, 2, 4])):
        scores[name].token_ids = [tokens, tokens[:1]]
    found = compared(RATIOS[0], scores)
    assert found == {"median": 1.75, "values": [3.0, 0.5], "equal": 0.75}
    scores["trimtab mato"].decoding, scores["trimtab base"].decoding = [1.0, 2.0], [3.0, 2.0]
    assert compared(Ratio("trimtab mato", "trimtab base"), scores)["values"] == [3.0, 1.0]
    assert equal_share([[1, 2]], [[2, 2]]) == 0.5


def test_every_ratio_is_of_contestants_that_there_are() -> None:
    names = {each.name for each in CONTESTANTS}
    assert all({ratio.ours, ratio.theirs} <= names for ratio in RATIOS)


def test_peers_skips_by_name_what_is_not_there(run: Callable[..., Ran], tiny_folder: Path) -> None:
    few = ("--num-prompts", "1", "--rounds", "2", "--output-len", "3", "--dtype", "float32")
    skipped = ("--skip", "transformers", "--skip", "amulet", "--skip", "vllm")
    ran = run("bench", "peers", "--model", str(tiny_folder), *few, *skipped)
    assert ran.status == 0, ran.err
    found: Any = json.loads(ran.out.splitlines()[-1])
    assert "llama_cpp" in found["peers"]
    assert found["peers"]["llama_cpp"]["skipped"].startswith("it needs the model as a file")
    assert [len(score["whole"]) for score in found["raw"].values()] == [2] * 6
    assert set(found["ratios"]) == {
        "trimtab mato / trimtab base",
        "trimtab mato sampled / trimtab mato",
        "trimtab mato kl_budget=0.2 / trimtab mato",
    }
    assert ran.err.count("round") == 2
