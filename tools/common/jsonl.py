"""Append-only JSON-lines files, whose last line may be incomplete after an interrupted run."""

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
    """A JSON-lines file. `line_prefix`: prefix of every line. `mismatch_text`: error text for others."""

    path: Path
    line_prefix: bytes
    mismatch_text: str

    def complete_lines(self) -> list[bytes]:
        """The complete lines; none if the path does not exist or is a device.

        Raises InputError if the incomplete rest does not match `line_prefix`.
        """
        if not self.path.is_file():
            return []
        *lines, partial = self.path.read_bytes().split(b"\n")
        if not partial.startswith(self.line_prefix[: len(partial)]):
            raise self.mismatch(len(lines) + 1)
        return lines

    def truncate_partial(self) -> None:
        """Remove an incomplete last line."""
        if self.path.is_file():
            os.truncate(self.path, self.path.read_bytes().rfind(b"\n") + 1)

    def append(self, lines: Iterable[str]) -> None:
        """Append lines. Raises RunError if they cannot be written."""
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.writelines(f"{line}\n" for line in lines)
        except OSError as error:
            raise RunError(f"cannot write {str(self.path)!r}: {error.strerror or error}") from error

    def mismatch(self, number: int) -> InputError:
        """The error for an unexpected line `number`."""
        return InputError(
            f"line {number} of {str(self.path)!r} is {self.mismatch_text}; name another --output"
        )
