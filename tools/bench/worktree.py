"""Another commit of this package beside the one at work: a worktree, by the name that Python imports."""

from __future__ import annotations

import subprocess
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ...kernels.common.errors import InputError, RunError
from ..common.environment import git

if TYPE_CHECKING:
    from collections.abc import Iterator


def resolved(root: Path, name: str) -> str:
    """The commit that a name means. Raises InputError where `root` is no checkout or has no such commit."""
    if git(root, "rev-parse", "--show-toplevel") != str(root):
        raise InputError(f"{str(root)!r} is no git checkout; there is no commit to compare with")
    found = git(root, "rev-parse", "--verify", "--end-of-options", f"{name}^{{commit}}")
    if found is None:
        raise InputError(f"BASE is {name!r}; it must be a commit of {str(root)!r}")
    return found


@contextmanager
def side_by_side(root: Path, commit: str) -> Iterator[tuple[Path, Path]]:
    """Two folders for PYTHONPATH: in one `trimtab` is `root` as it lies there, in the other that commit.

    Whatever happens the worktree is removed, and git forgets it. Raises RunError when git cannot make it.
    """
    with tempfile.TemporaryDirectory(prefix="trimtab-compare-") as scratch:
        tree = Path(scratch).resolve() / "tree"
        try:
            _git(root, "worktree", "add", "--detach", "--quiet", str(tree), commit)
            yield _linked(tree.parent / "this", root), _linked(tree.parent / "base", tree)
        finally:
            git(root, "worktree", "remove", "--force", str(tree))
            git(root, "worktree", "prune")


def _linked(folder: Path, package: Path) -> Path:
    """The root of the repository is itself the package, whatever it is called: shows it by its name."""
    folder.mkdir()
    (folder / "trimtab").symlink_to(package, target_is_directory=True)
    return folder


def _git(root: Path, *words: str) -> None:
    done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RunError(f"git {words[0]} {words[1]} failed: {' '.join(done.stderr.split())}")
