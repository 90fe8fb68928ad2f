"""`trimtab generate --input --output`: files of prompts, over the tiny model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ..conftest import Ran

Files = tuple[Path, Path]
Answer = Callable[..., Ran]
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
def answer(run: Callable[..., Ran], files: Files, tiny_folder: Path) -> Answer:
    """Runs the command over the files."""
    flags = ["--model", str(tiny_folder), "--max-tokens", "5", "--kv-cache-memory", "2MiB"]
    return lambda *more: run("generate", "--input", str(files[0]), "--output", str(files[1]), *flags, *more)


def written(path: Path) -> dict[int, dict[str, Any]]:
    """The answers by line, none twice."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    found = {line["line"]: line for line in lines}
    assert len(found) == len(lines)
    return found


def test_each_line_is_answered_and_bad_ones_do_not_stop_the_rest(answer: Answer, files: Files) -> None:
    assert answer() == Ran(1, "", "trimtab: answered 3 of 9 lines; 6 failed\n")
    found = written(files[1])
    assert len(found[1]["token_ids"]) == 5
    assert (found[2]["id"], found[2]["method"], len(found[2]["token_ids"])) == ("s", "mato", 3)
    assert [branch["name"] for branch in found[2]["branches"]] == ["base", "Be brief.", "Be kind."]
    assert (found[3]["seed"], len(found[3]["outputs"])) == (3, 2)
    for number, says in zip(
        range(5, 11),
        ("no JSON", "is 5", "'promt'", "empty", "top_p is 7", "prefer is 'y'"),
        strict=True,
    ):
        assert says in found[number]["error"]


def test_an_answer_is_that_of_the_command_for_one(
    answer: Answer, files: Files, run: Callable[..., Ran], tiny_folder: Path
) -> None:
    answer()
    alone = run("generate", "What is rain?", "--model", str(tiny_folder), "--max-tokens", "5", "--json")
    assert json.loads(alone.out)["token_ids"] == written(files[1])[1]["token_ids"]


@pytest.mark.parametrize("key", ["\u00b2", "05", "x", "-1"])
def test_a_key_that_is_no_token_id_is_a_wrong_line(answer: Answer, files: Files, key: str) -> None:
    files[0].write_text(json.dumps({"prompt": "x", "logit_bias": {key: 1}}))
    assert answer().status == 1
    assert "keys must be token ids" in written(files[1])[1]["error"]


def test_what_was_answered_stays_and_a_half_written_line_is_done_again(answer: Answer, files: Files) -> None:
    answer()
    whole = files[1].read_bytes()
    first, *_ = whole.splitlines(keepends=True)
    cut = len(whole) - 7
    files[1].write_bytes(whole[:cut])
    assert answer().err == "trimtab: answered 1 of 1 lines\n"
    assert files[1].read_bytes().startswith(first)
    assert sorted(written(files[1])) == [1, 2, 3, 5, 6, 7, 8, 9, 10]
    before = files[1].read_bytes()
    assert "6 of them with an error" in answer().err
    assert files[1].read_bytes() == before


def test_another_runs_output_is_not_touched(answer: Answer, files: Files) -> None:
    answer()
    files[0].write_text('"What is hail?"\n')
    before = files[1].read_bytes()
    refused = answer()
    assert refused.status == 2
    assert "answers another line" in refused.err
    files[1].write_text("my notes\n")
    refused = answer()
    assert "is no answer of an earlier run" in refused.err
    assert files[1].read_text() == "my notes\n" != before


@pytest.mark.parametrize("text", ["precious notes", '{"line": [1], "input": "x"}\n', "[]\n", "\n"])
def test_a_file_that_is_no_output_is_not_touched(answer: Answer, files: Files, text: str) -> None:
    files[1].write_text(text)
    refused = answer()
    assert (refused.status, "is no answer of an earlier run" in refused.err) == (2, True)
    assert files[1].read_text() == text


def test_the_input_is_not_the_output(answer: Answer, files: Files) -> None:
    files[1].symlink_to(files[0])
    before = files[0].read_text()
    assert "is --input, too" in answer().err
    assert files[0].read_text() == before


def test_a_device_may_take_the_answers(run: Callable[..., Ran], files: Files, tiny_folder: Path) -> None:
    flags = ["--model", str(tiny_folder), "--max-tokens", "2", "--kv-cache-memory", "2MiB"]
    for _ in range(2):
        ran = run("generate", "--input", str(files[0]), "--output", "/dev/null", *flags)
        assert "answered 3 of 9" in ran.err


def test_flags_that_do_not_go_together(run: Callable[..., Ran], files: Files) -> None:
    assert "belong together" in run("generate", "--input", str(files[0])).err
    assert "exclude each other" in run("generate", "x", "--input", "a", "--output", "b").err
    assert "there is no PROMPT" in run("generate").err
    missing = run("generate", "--input", "none.jsonl", "--output", str(files[1]))
    assert (missing.status, "none.jsonl" in missing.err) == (1, True)
    assert not files[1].exists()


def test_more_samples_than_may_wait_are_answered_all_the_same(answer: Answer, files: Files) -> None:
    files[0].write_text('{"prompt": "x", "n": 4, "temperature": 1}\n' * 6)
    assert answer("--max-waiting", "2", "--max-num-seqs", "4").err == "trimtab: answered 6 of 6 lines\n"
    assert [len(found["outputs"]) for found in written(files[1]).values()] == [4] * 6
