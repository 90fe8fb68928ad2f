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
"""A half-made folder untouched for so long has no process behind it, unless one has the number in its name:
clocks jump."""


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """A path to build `folder` at. It takes its name when the block ends well, and is removed when not.

    It lies in a hidden folder beside, so a killed process leaves nothing under the name, and its parent is
    free for scratch files. Raises InputError when `folder` is there and not empty, before or after the block.
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
        require_empty(folder)  # it may have come to be meanwhile
        raise RunError(f"cannot write {str(folder)!r}: {error.strerror or error}") from error


def require_empty(folder: Path) -> None:
    """Raises InputError when `folder` is there and not empty."""
    try:
        occupied = any(folder.iterdir()) if os.path.isdir(folder) else os.path.lexists(folder)
    except OSError as error:
        raise RunError(f"cannot look into {str(folder)!r}: {error.strerror}") from error
    if occupied:
        raise InputError(f"{str(folder)!r} is there already; it must be a new or an empty folder")


def _remove_stale(parent: Path, prefix: str) -> None:
    """Removes what killed processes left behind."""
    for leftover in parent.iterdir():
        with suppress(OSError):
            if not leftover.name.startswith(prefix) or _is_running(
                leftover.name[len(prefix) :].partition("-")[0]
            ):
                continue
            if time.time() - leftover.stat().st_mtime > STALE_SECONDS:
                shutil.rmtree(leftover, ignore_errors=True)


def _is_running(pid: str) -> bool:
    """Whether there is a process of that number on this machine."""
    try:
        os.kill(int(pid), 0)
    except (ValueError, OverflowError, ProcessLookupError):
        return False
    except PermissionError:
        pass
    return True
