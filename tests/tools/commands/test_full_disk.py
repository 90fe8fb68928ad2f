"""A full disk: one error line, status 1, and no partial file is taken for a complete one.

The file size limit of the system (RLIMIT_FSIZE) simulates the full disk: writes beyond it fail.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from ...helpers import gguf_files
from ...helpers.disk_limit import disk_limit
from ..conftest import CommandResult, read_answers

Run = Callable[..., CommandResult]


def test_a_full_disk_during_a_batch_is_one_error_line_and_the_run_resumes(
    run: Run, tiny_folder: Path, tmp_path: Path
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text("\n".join(json.dumps(f"What is {n}?") for n in range(6)))
    flags = ["--model", str(tiny_folder), "--max-tokens", "4", "--kv-cache-memory", "2MiB", "--seed", "1"]

    def answer(target: Path) -> CommandResult:
        return run("generate", "--input", str(source), "--output", str(target), *flags)

    complete, target = tmp_path / "complete.jsonl", tmp_path / "out.jsonl"
    assert answer(complete).status == 0
    for share in (0, 0.4, 0.7):
        with disk_limit(int(share * complete.stat().st_size)):
            ran = answer(target)
        assert ran == CommandResult(1, "", f"trimtab: cannot write '{target}': File too large\n")
    assert 0 < target.read_bytes().count(b"\n") < 6
    assert answer(target).status == 0
    assert read_answers(target) == read_answers(complete)


def test_a_full_disk_during_a_study_is_one_error_line_and_the_run_resumes(
    run: Run, tiny_folder: Path, tmp_path: Path
) -> None:
    flags = ["--aim", "Be kind.=lexical:[aeiou]", "--aim", "Be brief.=-length:characters", "--weights", "3"]
    flags += ["--methods", "base,mato", "--limit", "2", "--max-tokens", "4", "--scorers", "length"]
    flags += ["--model", str(tiny_folder), "--kv-cache-memory", "2MiB"]
    out, complete = tmp_path / "out", tmp_path / "complete"
    assert run("evaluate", *flags, "--output", str(complete)).status == 0
    written = (complete / "answers.jsonl").stat().st_size
    for limit, file in ((100, "study.json"), (int(0.6 * written), "answers.jsonl"), (4 * written, "report")):
        with disk_limit(limit):
            ran = run("evaluate", *flags, "--output", str(out))
        assert (ran.status, ran.stdout) == (1, "")
        last = ran.stderr.splitlines()[-1]
        assert last.startswith("trimtab: ")
        assert "File too large" in last, file
        assert not (out / "report.md").exists()
        assert not (out / "report.json").exists()
    assert run("evaluate", *flags, "--output", str(out)).status == 0
    answers = [sorted((folder / "answers.jsonl").read_text().splitlines()) for folder in (out, complete)]
    assert answers[0] == answers[1]
    assert not list(out.glob("*.part"))


def test_a_full_disk_during_a_conversion_leaves_nothing(run: Run, tmp_path: Path) -> None:
    source = gguf_files.write_gguf(tmp_path / "tiny.gguf")
    for size in (0, 1000, 200_000):
        with disk_limit(size):
            ran = run("convert", str(source), str(tmp_path / "new" / "out"))
        assert (ran.status, ran.stdout) == (1, "")
        assert ran.stderr.startswith("trimtab: ")
        assert (ran.stderr.count("\n"), "File too large" in ran.stderr) == (1, True)
        assert list((tmp_path / "new").iterdir()) == []
    assert run("convert", str(source), str(tmp_path / "new" / "out")).status == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full on this system")
@pytest.mark.parametrize("arguments", [["--version"], ["bench", "latency", "--help"], ["info", "demo"]])
def test_a_full_standard_output_is_one_error_line(arguments: list[str]) -> None:
    with open("/dev/full", "w") as full:
        ran = subprocess.run(
            [sys.executable, "-m", "trimtab", *arguments], stdout=full, stderr=subprocess.PIPE, check=False
        )
    assert (ran.returncode, ran.stderr) == (1, b"trimtab: No space left on device\n")
