"""Files that lines of JSON are added to, and that a run may leave with the last one half-written."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...kernels.common.errors import InputError, RunError

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path


@dataclass(frozen=True)
class JSONLFile:
    """Such a file. `line_prefix` is that of every line; `mismatch_text` says what a line is that does not
    belong.
    """

    path: Path
    line_prefix: bytes
    mismatch_text: str

    def complete_lines(self) -> list[bytes]:
        """The whole lines, none where there is no file, or a device.

        Raises InputError when what follows them is not the beginning of such a line.
        """
        if not self.path.is_file():
            return []
        *lines, partial = self.path.read_bytes().split(b"\n")
        if not partial.startswith(self.line_prefix[: len(partial)]):
            raise self.mismatch(len(lines) + 1)
        return lines

    def truncate_partial(self) -> None:
        """Takes away a last line that is half-written."""
        if self.path.is_file():
            os.truncate(self.path, self.path.read_bytes().rfind(b"\n") + 1)

    def append(self, lines: Iterable[str]) -> None:
        """Writes lines at the end. Raises RunError when they cannot be."""
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(f"{line}\n" for line in lines)
        except OSError as error:
            raise RunError(f"cannot write {str(self.path)!r}: {error.strerror or error}") from error

    def mismatch(self, number: int) -> InputError:
        """The error for a line that such a file does not have."""
        return InputError(
            f"line {number} of {str(self.path)!r} is {self.mismatch_text}; name another --output"
        )
