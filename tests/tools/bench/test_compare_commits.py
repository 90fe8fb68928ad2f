"""Comparison of two commits: removal of the worktree, and the thresholds for slower."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from trimtab import InputError
from trimtab.tools.bench.compare import Comparison
from trimtab.tools.bench.worktree import link_side_by_side, resolve_commit
from trimtab.tools.common import environment

from ..conftest import CommandResult

PACKAGE = environment.ROOT
CODE = ("__init__.py", "__main__.py", "kernels", "models", "engine", "tools")


def git(root: Path, *words: str) -> str:
    identity = ["-c", "user.name=A", "-c", "user.email=a@b"]
    result = subprocess.run(
        ["git", "-C", str(root), *identity, *words], capture_output=True, text=True, check=True
    )
    return result.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A repository with two commits of one file."""
    root = tmp_path / "here"
    root.mkdir()
    git(root, "init", "--quiet")
    for text in ("first", "second"):
        (root / "file").write_text(text)
        git(root, "add", ".")
        git(root, "commit", "--quiet", "-m", text)
    return root


def test_the_base_commit_is_linked_beside_the_working_tree(repository: Path) -> None:
    (repository / "file").write_text("third")
    with link_side_by_side(repository, resolve_commit(repository, "HEAD~1")) as (this, base):
        assert (this / "trimtab" / "file").read_text() == "third"
        assert (base / "trimtab" / "file").read_text() == "first"
        assert git(repository, "worktree", "list").count("\n") == 1
    assert not base.exists()


def test_a_failure_leaves_no_worktree(repository: Path) -> None:
    with pytest.raises(ZeroDivisionError), link_side_by_side(repository, "HEAD") as (_, base):
        raise ZeroDivisionError
    assert git(repository, "worktree", "list").count("\n") == 0
    assert not base.exists()
    assert git(repository, "status", "--porcelain") == ""


def test_an_unknown_commit_is_refused_by_name(repository: Path, tmp_path: Path) -> None:
    assert resolve_commit(repository, "HEAD") == git(repository, "rev-parse", "HEAD")
    for name in ("nobody", "--help", ""):
        with pytest.raises(InputError, match=f"BASE is {name!r}"):
            resolve_commit(repository, name)
    with pytest.raises(InputError, match="is not a git checkout"):
        resolve_commit(tmp_path, "HEAD")


def test_uncommitted_changes_mark_a_commit_as_dirty(repository: Path, tmp_path: Path) -> None:
    head = git(repository, "rev-parse", "HEAD")
    assert environment.get_commit(repository) == head
    (repository / "new").touch()
    assert environment.get_commit(repository) == f"{head}-dirty"
    assert environment.get_commit(tmp_path) is None


@pytest.mark.parametrize(
    ("this", "base", "slower"),
    [
        ([11.0, 11.2, 20.0], [10.0, 10.0, 10.0], True),
        ([10.4, 10.4, 10.4], [10.0, 10.0, 10.0], False),  # below the relative threshold
        ([1.2, 1.2, 1.2], [1.0, 1.0, 1.0], False),  # below the absolute threshold
        ([9.0, 9.0, 30.0], [10.0, 10.0, 10.0], False),  # one slow round
        ([22.0, 11.0, 11.0], [20.0, 10.0, 10.0], True),  # the machine was slow for both
    ],
)
def test_slower_exceeds_both_thresholds(this: list[float], base: list[float], slower: bool) -> None:
    assert Comparison(this, base, rel_threshold=0.05, abs_threshold_ms=0.5).is_slower is slower


@pytest.mark.parametrize(
    ("tests", "status", "sentence"),
    [
        ("false", 1, "the tests failed ('false': exit status 1); nothing is compared"),
        ("no-such-command", 2, "tests is 'no-such-command', which cannot be run"),
        ("'", 2, "which cannot be run: No closing quotation"),
    ],
)
def test_nothing_is_compared_when_the_tests_fail(
    run: Callable[..., CommandResult],
    repository: Path,
    monkeypatch: pytest.MonkeyPatch,
    tests: str,
    status: int,
    sentence: str,
) -> None:
    monkeypatch.setattr(environment, "ROOT", repository)
    ran = run("bench", "compare", "HEAD~1", f"--tests={tests}")
    assert (ran.status, ran.stdout) == (status, "")
    assert sentence in ran.stderr


@pytest.mark.long
def test_a_slower_commit_is_detected_and_an_equal_one_is_not(tmp_path: Path, tiny_folder: Path) -> None:
    root = tmp_path / "code"
    for name in CODE:
        copy = shutil.copytree if (PACKAGE / name).is_dir() else shutil.copy
        root.mkdir(exist_ok=True)
        copy(PACKAGE / name, root / name)
    (root / ".gitignore").write_text("__pycache__\n")
    git(root, "init", "--quiet")
    git(root, "add", ".")
    git(root, "commit", "--quiet", "-m", "whole")
    (tmp_path / "path").mkdir()
    (tmp_path / "path" / "trimtab").symlink_to(root)

    def compare() -> tuple[int, Any]:
        args = ["bench", "compare", "HEAD", "--tests", "true", "--model", str(tiny_folder)]
        result = subprocess.run(
            [sys.executable, "-m", "trimtab", *args, "--relative", "0.5", "--output-len", "8"],
            env={**os.environ, "PYTHONPATH": str(tmp_path / "path")},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.stdout, result.stderr
        return result.returncode, json.loads(result.stdout.splitlines()[-1])

    status, report = compare()
    assert (status, report["slower"]) == (0, [])
    assert report["commit"] == report["base"]
    core = root / "engine" / "core" / "engine_core.py"
    text, call = core.read_text(), "self.scheduler.schedule()"
    assert call in text
    core.write_text(text.replace(call, f'__import__("time").sleep(0.05) or {call}'))
    status, report = compare()
    assert (status, report["slower"]) == (1, ["base", "mato", "8 x mato"])
    assert report["commit"] == f"{report['base']}-dirty"
    assert git(root, "worktree", "list").count("\n") == 0
