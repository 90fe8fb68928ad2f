"""Create a folder atomically: it appears under its name complete, or not at all."""

from __future__ import annotations

import os
import shutil
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from ...kernels.common.errors import InputError, RunError

if TYPE_CHECKING:
    from collections.abc import Iterator

STALE_SECONDS = 86_400
"""Age after which a partial folder is removed, if its process has ended too: clocks jump."""


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a path to build `folder` at. It is renamed to `folder` on success and removed on an exception.

    The path is in a hidden sibling folder, so a killed process leaves nothing under the final name, and its
    parent can be used for scratch files. Raises InputError when `folder` exists and is not empty, before or
    after the block.
    """
    folder = folder.resolve()
    prefix = f".{folder.name}.partial-"
    require_empty(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(folder.parent, prefix)
        with TemporaryDirectory(
            prefix=f"{prefix}{os.getpid()}-", dir=folder.parent, ignore_cleanup_errors=True
        ) as scratch:
            staging = Path(scratch) / folder.name
            yield staging
            staging.rename(folder)
    except OSError as error:
        require_empty(folder)  # it may have been created meanwhile
        raise RunError(f"cannot write {str(folder)!r}: {error.strerror or error}") from error


def require_empty(folder: Path) -> None:
    """Raise InputError when `folder` exists and is not an empty folder."""
    try:
        occupied = any(folder.iterdir()) if os.path.isdir(folder) else os.path.lexists(folder)
    except OSError as error:
        raise RunError(f"cannot list {str(folder)!r}: {error.strerror}") from error
    if occupied:
        raise InputError(f"{str(folder)!r} already exists; it must be a new or empty folder")


def _remove_stale(parent: Path, prefix: str) -> None:
    """Remove the partial folders of killed processes."""
    for leftover in parent.iterdir():
        with suppress(OSError):
            if not leftover.name.startswith(prefix) or _is_running(
                leftover.name[len(prefix) :].partition("-")[0]
            ):
                continue
            if time.time() - leftover.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(leftover, ignore_errors=True)


def _is_running(pid: str) -> bool:
    """Whether a process with this id is running."""
    try:
        os.kill(int(pid), 0)
    except (ValueError, OverflowError, ProcessLookupError):
        return False
    except PermissionError:
        pass
    return True
