"""`trimtab generate --input --output`: batches of prompts on the tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ..conftest import CommandResult

Files = tuple[Path, Path]
Answer = Callable[..., CommandResult]
GOOD = [
    "What is rain?",
    {"prompt": "What is snow?", "id": "s", "prefer": ["Be brief.=0.7", "Be kind."], "max_tokens": 3},
    {"messages": [{"role": "user", "content": "Hi"}], "temperature": 1, "seed": 3, "n": 2},
]
BAD = [
    "{",
    "5",
    '{"promt": "x"}',
    '{"prompt": ""}',
    '{"prompt": "x", "top_p": 7}',
    '{"prompt": "x", "prefer": "y"}',
]


@pytest.fixture
def files(tmp_path: Path) -> Files:
    source = tmp_path / "in.jsonl"
    source.write_text("\n".join([*map(json.dumps, GOOD), "", *BAD]))
    return source, tmp_path / "out.jsonl"


@pytest.fixture
def run_batch(run: Callable[..., CommandResult], files: Files, tiny_folder: Path) -> Answer:
    """Run the command on the files."""
    flags = ["--model", str(tiny_folder), "--max-tokens", "5", "--kv-cache-memory", "2MiB"]
    return lambda *more: run("generate", "--input", str(files[0]), "--output", str(files[1]), *flags, *more)


def answers_by_line(path: Path) -> dict[int, dict[str, Any]]:
    """The answers by line number; checks that none occurs twice."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    answers = {line["line"]: line for line in lines}
    assert len(answers) == len(lines)
    return answers


def test_each_line_is_answered_and_bad_ones_do_not_stop_the_rest(run_batch: Answer, files: Files) -> None:
    assert run_batch() == CommandResult(1, "", "trimtab: answered 3 of 9 lines; 6 failed\n")
    answers = answers_by_line(files[1])
    assert len(answers[1]["token_ids"]) == 5
    assert (answers[2]["id"], answers[2]["method"], len(answers[2]["token_ids"])) == ("s", "trim", 3)
    assert [branch["name"] for branch in answers[2]["branches"]] == ["base", "Be brief.", "Be kind."]
    assert (answers[3]["seed"], len(answers[3]["outputs"])) == (3, 2)
    for number, expected in zip(
        range(5, 11),
        ("invalid JSON", "is 5", "'promt'", "empty", "top_p is 7", "prefer is 'y'"),
        strict=True,
    ):
        assert expected in answers[number]["error"]


def test_a_batch_answer_equals_that_of_a_single_prompt(
    run_batch: Answer, files: Files, run: Callable[..., CommandResult], tiny_folder: Path
) -> None:
    run_batch()
    alone = run("generate", "What is rain?", "--model", str(tiny_folder), "--max-tokens", "5", "--json")
    assert json.loads(alone.stdout)["token_ids"] == answers_by_line(files[1])[1]["token_ids"]


@pytest.mark.parametrize("key", ["\u00b2", "05", "x", "-1"])
def test_an_invalid_logit_bias_key_fails_its_line(run_batch: Answer, files: Files, key: str) -> None:
    files[0].write_text(json.dumps({"prompt": "x", "logit_bias": {key: 1}}))
    assert run_batch().status == 1
    assert "keys must be token ids" in answers_by_line(files[1])[1]["error"]


def test_finished_answers_are_kept_and_a_partial_line_is_redone(run_batch: Answer, files: Files) -> None:
    run_batch()
    content = files[1].read_bytes()
    first, *_ = content.splitlines(keepends=True)
    cut = len(content) - 7
    files[1].write_bytes(content[:cut])
    assert run_batch().stderr == "trimtab: answered 1 of 1 lines\n"
    assert files[1].read_bytes().startswith(first)
    assert sorted(answers_by_line(files[1])) == [1, 2, 3, 5, 6, 7, 8, 9, 10]
    before = files[1].read_bytes()
    assert "6 of them with an error" in run_batch().stderr
    assert files[1].read_bytes() == before


def test_the_output_of_another_run_is_not_touched(run_batch: Answer, files: Files) -> None:
    run_batch()
    files[0].write_text('"What is hail?"\n')
    before = files[1].read_bytes()
    refused = run_batch()
    assert refused.status == 2
    assert "differs from the one in" in refused.stderr
    files[1].write_text("my notes\n")
    refused = run_batch()
    assert "is not an answer of an earlier run" in refused.stderr
    assert files[1].read_text() == "my notes\n" != before


@pytest.mark.parametrize(
    "flags",
    [
        ["--prefer", "Be kind."],
        ["--prefer", "Be kind.", "--method", "mato"],
        ["--system", "Speak Latin."],
        ["--temperature", "0.5"],
        ["--max-tokens", "6"],
        ["--dtype", "bfloat16"],
    ],
)
def test_answers_of_other_settings_are_not_mixed(run_batch: Answer, files: Files, flags: list[str]) -> None:
    run_batch()
    before = files[1].read_bytes()
    assert len({line["settings"] for line in answers_by_line(files[1]).values()}) == 1
    refused = run_batch(*flags)
    assert (refused.status, refused.stdout) == (2, "")
    assert (
        "with other objectives, method, sampling, system text or model; name another --output"
        in refused.stderr
    )
    assert files[1].read_bytes() == before
    assert run_batch("--max-num-seqs", "7", "--no-trace").status == 1, "these change no answer"


def test_answers_without_their_settings_are_not_gone_on_with(run_batch: Answer, files: Files) -> None:
    run_batch()
    lines = [json.loads(line) for line in files[1].read_text().splitlines()]
    files[1].write_text("".join(json.dumps({**line, "settings": None}) + "\n" for line in lines))
    assert "name another --output" in run_batch().stderr


@pytest.mark.parametrize("text", ["precious notes", '{"line": [1], "input": "x"}\n', "[]\n", "\n"])
def test_a_file_that_is_not_an_output_is_not_touched(run_batch: Answer, files: Files, text: str) -> None:
    files[1].write_text(text)
    refused = run_batch()
    assert (refused.status, "is not an answer of an earlier run" in refused.stderr) == (2, True)
    assert files[1].read_text() == text


def test_the_output_may_not_be_the_input(run_batch: Answer, files: Files) -> None:
    files[1].symlink_to(files[0])
    before = files[0].read_text()
    assert "is the same file as --input" in run_batch().stderr
    assert files[0].read_text() == before


def test_the_output_may_be_a_device(
    run: Callable[..., CommandResult], files: Files, tiny_folder: Path
) -> None:
    flags = ["--model", str(tiny_folder), "--max-tokens", "2", "--kv-cache-memory", "2MiB"]
    for _ in range(2):
        ran = run("generate", "--input", str(files[0]), "--output", "/dev/null", *flags)
        assert "answered 3 of 9" in ran.stderr


def test_conflicting_flags_are_refused(run: Callable[..., CommandResult], files: Files) -> None:
    assert "must be given together" in run("generate", "--input", str(files[0])).stderr
    assert (
        "expected a prompt or --input, got both"
        in run("generate", "x", "--input", "a", "--output", "b").stderr
    )
    assert "expected a prompt, or --input FILE" in run("generate").stderr
    missing = run("generate", "--input", "none.jsonl", "--output", str(files[1]))
    assert (missing.status, "none.jsonl" in missing.stderr) == (1, True)
    assert not files[1].exists()


def test_more_samples_than_max_waiting_are_all_answered(run_batch: Answer, files: Files) -> None:
    files[0].write_text('{"prompt": "x", "n": 4, "temperature": 1}\n' * 6)
    assert run_batch("--max-waiting", "2", "--max-num-seqs", "4").stderr == "trimtab: answered 6 of 6 lines\n"
    assert [len(answer["outputs"]) for answer in answers_by_line(files[1]).values()] == [4] * 6
