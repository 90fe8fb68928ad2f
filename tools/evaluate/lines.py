"""Files that lines of JSON are added to, and that a run may leave with the last one half-written."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from ...kernels.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path


def whole(path: Path, beginning: bytes) -> list[bytes]:
    """The whole lines of a file, none where there is no file. `beginning` is that of every line.

    Raises InputError when what follows them is not the beginning of such a line.
    """
    if not path.exists():
        return []
    written = path.read_bytes()
    *lines, rest = written.split(b"\n")
    if not rest.startswith(beginning[: len(rest)]):
        raise foreign(len(lines) + 1, path)
    return lines


def cut(path: Path) -> None:
    """Takes away a last line that is half-written."""
    if path.exists():
        os.truncate(path, path.read_bytes().rfind(b"\n") + 1)


def foreign(number: int, path: Path) -> InputError:
    """The error for a line that such a file does not have."""
    return InputError(f"line {number} of {str(path)!r} is not of a study; name another --output")
