"""A git worktree of another commit, importable as `trimtab` next to the working tree."""

from __future__ import annotations

import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ...kernels.common.errors import InputError, RunError
from ..common.environment import run_git

if TYPE_CHECKING:
    from collections.abc import Iterator


def resolve_commit(root: Path, name: str) -> str:
    """The commit hash of a name. Raises InputError if `root` is not a checkout or lacks that commit."""
    if run_git(root, "rev-parse", "--show-toplevel") != str(root):
        raise InputError(f"{str(root)!r} is not a git checkout, so it has no commit to compare with")
    commit = run_git(root, "rev-parse", "--verify", "--end-of-options", f"{name}^{{commit}}")
    if commit is None:
        raise InputError(f"BASE is {name!r}; it must be a commit of {str(root)!r}")
    return commit


@contextmanager
def link_side_by_side(root: Path, commit: str) -> Iterator[tuple[Path, Path]]:
    """Two folders for PYTHONPATH: in the first `trimtab` is the working tree `root`, in the second `commit`.

    The worktree is always removed and pruned. Raises RunError if git cannot create it.
    """
    with tempfile.TemporaryDirectory(prefix="trimtab-compare-") as scratch:
        worktree = Path(scratch).resolve() / "tree"
        try:
            _git(root, "worktree", "add", "--detach", "--quiet", str(worktree), commit)
            yield (
                _link_package(worktree.parent / "this", root),
                _link_package(worktree.parent / "base", worktree),
            )
        finally:
            run_git(root, "worktree", "remove", "--force", str(worktree))
            run_git(root, "worktree", "prune")


def _link_package(folder: Path, package: Path) -> Path:
    """Link the repository root, which is the package, under the name `trimtab`."""
    folder.mkdir()
    (folder / "trimtab").symlink_to(package, target_is_directory=True)
    return folder


def _git(root: Path, *args: str) -> None:
    result = subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, check=False)
    if result.returncode:
        raise RunError(f"git {args[0]} {args[1]} failed: {' '.join(result.stderr.split())}")
