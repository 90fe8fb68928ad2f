"""`trimtab bench latency` and `throughput` on a tiny model, through the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from trimtab import Engine, Mato, Objective, Request
from trimtab.tools.bench import BENCHES

from ...helpers.tiny_model import TinyModel, write_json
from ..conftest import CommandResult

pytestmark = pytest.mark.usefixtures("fast_machine_peaks")

Run = Callable[..., CommandResult]
SHORT = ("--input-len", "9", "--output-len", "5", "--kv-cache-memory", "8MiB")
OBJECTIVE_FLAGS = ("--prefer", "Be kind.=0.7", "--prefer", "Be brief.=0.3")


def last_line(ran: CommandResult) -> Any:
    assert ran.status == 0, ran.stderr
    return json.loads(ran.stdout.splitlines()[-1])


def test_latency_reports_step_times_and_the_roofline(run: Run, tiny_folder: Path) -> None:
    iterations = ("--batch-size", "2", "--num-iters", "3", "--num-iters-warmup", "0")
    ran = run("bench", "latency", "--model", str(tiny_folder), *SHORT, *OBJECTIVE_FLAGS, *iterations)
    report = last_line(ran)
    assert {len(values) for values in report["raw"].values()} == {3}
    assert report["rows"] == 6
    assert report["method"]["name"] == "trim"
    assert report["config"]["batch_size"] == 2
    step = report["median_step_ms"] / 1e3
    assert report["decode_throughput"] == pytest.approx(2 / step)
    assert report["gigabytes_per_second"] == pytest.approx(report["bytes"] / step / 1e9)
    ratio = report["gigabytes_per_second"] / report["measured_bandwidth"]
    assert report["bandwidth_share"] == pytest.approx(ratio)
    assert report["median_latency_ms"] > report["median_ttft_ms"] > 0
    assert "step of 6 rows, ms" in ran.stdout


def test_a_step_reads_each_weight_once_and_the_cache_of_each_row(run: Run, tiny_folder: Path) -> None:
    ran = run("bench", "latency", "--model", str(tiny_folder), *SHORT, "--num-iters", "1")
    shape = TinyModel()
    weights = sum(tensor.numel() for tensor in shape.tensors().values())
    cache_elements = (9 + 5 / 2) * 2 * shape.layers * shape.kv_heads * shape.hidden // shape.heads
    assert last_line(ran)["bytes"] == 4 * (weights + cache_elements)


def test_throughput_counts_requests_tokens_and_branches(run: Run, tiny_folder: Path) -> None:
    args = ("--num-prompts", "4", "--num-iters", "2", "--one-by-one", "--steered-share", "0.5")
    report = last_line(
        run("bench", "throughput", "--model", str(tiny_folder), *SHORT, *OBJECTIVE_FLAGS, *args)
    )
    rows = 2 * 1 + 2 * 3
    assert (report["completed"], report["branches"]) == (4, rows)
    assert (report["total_input_tokens"], report["total_output_tokens"]) == (rows * 9, 4 * 5)
    assert report["output_throughput"] == pytest.approx(20 / report["duration"])
    assert report["total_token_throughput"] == pytest.approx((20 + rows * 9) / report["duration"])
    once, apart = report["raw"]["at_once"], report["raw"]["one_by_one"]
    assert report["raw"]["ratios"] == pytest.approx([b / a for a, b in zip(once, apart, strict=True)])


def test_dataset_questions_are_rendered_for_each_branch(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    questions = ["What is rain?", "Who was Ada Lovelace, the first of us?"]
    write_json(tmp_path / "asked.json", questions)
    dataset = ("--dataset-path", str(tmp_path / "asked.json"), "--output-len", "2", "--num-prompts", "2")
    report = last_line(run("bench", "throughput", "--model", str(tiny_folder), *dataset, *OBJECTIVE_FLAGS))
    engine = Engine.from_pretrained(str(tiny_folder))
    method = Mato((Objective("Be kind.", 0.7), Objective("Be brief.", 0.3)))
    prompts = [branch for text in questions for branch in engine.render(Request(text, method))]
    assert report["total_input_tokens"] == sum(len(branch.prompt_token_ids) for branch in prompts)


def test_a_config_without_weights_can_be_measured(run: Run, tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", TinyModel().config())
    dummy = ("--model", str(tmp_path), "--load-format", "dummy", "--num-iters", "1")
    assert last_line(run("bench", "throughput", *dummy, *SHORT, "--num-prompts", "2"))["completed"] == 2


def test_a_failed_request_fails_the_run(run: Run, tiny_folder: Path) -> None:
    ran = run("bench", "throughput", "--model", str(tiny_folder), "--input-len", "600")
    assert (ran.status, ran.stdout) == (1, "")
    assert ran.stderr.startswith("trimtab: a request ended after 0 of 64 tokens: ")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ((), f"BENCH is missing; it must be one of {', '.join(BENCHES)}"),
        (("weather",), f"unknown bench 'weather'; benches are {', '.join(BENCHES)}"),
        (("latency", "--num-iters", "0"), "num_iters is 0; it must be an integer from 1 to 10000"),
        (
            ("latency", "--steered-share", "0.5"),
            "steered_share is 0.5, which needs an objective",
        ),
        (
            ("latency", "--batch-size", "20", "--prefer", "x", "--prefer", "y"),
            "batch_size is 20, which makes 60 branches; max_num_seqs allows 48 at once",
        ),
        (("latency", "--tau", "1"), "--tau belongs to mato, not to base"),
        (("throughput", "--num-prompts", "x"), "--num-prompts is 'x'; it must be an integer"),
        (
            ("throughput", "--dataset-path", "questions", "--input-len", "9"),
            "input_len is 9; it must be left out with dataset_path",
        ),
        (("serve", "--base-url", "ftp://x"), "base_url is 'ftp://x'; it must be like http://127.0.0.1:8000"),
        (("serve", "--request-rate", "0"), "request_rate is 0.0; it must be a number above 0, or inf"),
        (("serve", "--endpoint", "/x"), "endpoint is '/x'; it must be one of /v1/chat/completions, "),
        (("overhead", "--rounds", "0"), "rounds is 0; it must be an integer ≥ 1"),
        (("overhead", "--model", "nowhere"), "model is 'nowhere'; it must be 'demo', "),
        (("peers", "--peer", "llama"), "--peer is 'llama'; it must be like vllm=/path/to/python"),
        (("peers", "--skip", "gpt"), "--skip is 'gpt'; contestants are trimtab base, "),
        (("peers", "--batch-size", "3"), "batch_size is 3; it must be from 1 to num_prompts (2)"),
        (("peers", "--gguf", "nowhere.gguf"), "gguf is 'nowhere.gguf'; it must be an existing file"),
        (("compare",), "the following arguments are required: BASE; see trimtab bench compare --help"),
        (("compare", "HEAD", "--tests", " "), "tests is ' '; it must be a command"),
    ],
)
def test_invalid_input_is_reported_in_one_sentence_before_loading(
    run: Run, words: tuple[str, ...], sentence: str
) -> None:
    ran = run("bench", *words)
    assert (ran.status, ran.stdout) == (2, "")
    assert ran.stderr.startswith(f"trimtab: {sentence}")
    assert ran.stderr.count("\n") == 1


@pytest.mark.parametrize("bench", BENCHES)
def test_every_bench_has_help(run: Run, bench: str) -> None:
    ran = run("bench", bench, "--help")
    assert (ran.status, ran.stderr) == (0, "")
    assert ran.stdout.startswith(f"usage: trimtab bench {bench} ")
