"""Report of a GPU check: rows, printed as they are recorded, and failures, which do not stop the check."""

from __future__ import annotations

import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...engine.utils.json import dumps

MAX_FRAMES = 4
"""Stack frames shown of a failure, the innermost last."""
CPU = torch.device("cpu")


@dataclass
class CheckReport:
    """Rows, failures, and parts skipped after the deadline.

    deadline: time.monotonic() after which no part starts. num_done: parts already done by another process.
    path: result file, rewritten after every row. metadata: fields that apply to all rows. num_seen: parts
    passed to `should_skip`. gpu_lost: the GPU is unusable for this process.
    """

    deadline: float
    device: torch.device = CPU
    num_done: int = 0
    path: Path | None = None
    rows: list[dict[str, Any]] = field(default_factory=list)
    failures: list[dict[str, str]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    metadata: dict[str, Any] = field(default_factory=dict)
    num_seen: int = 0
    gpu_lost: bool = False

    @contextmanager
    def record(self, section: str, name: str) -> Iterator[dict[str, Any]]:
        """Yield a row to fill in. An exception inside is a failure of this row only.

        A row with a non-empty "wrong" is a failure too. Call `should_skip` first.
        """
        row: dict[str, Any] = {"section": section, "name": name}
        start = time.monotonic()
        try:
            yield row
            self._synchronize()
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)[-MAX_FRAMES:]
            row["wrong"] = f"{type(error).__name__}: {str(error).strip()[-600:]}"
            row["at"] = " > ".join(f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno}" for frame in frames)
            self._probe_gpu()
        row["seconds"] = round(time.monotonic() - start, 3)
        self.rows.append(row)
        if row.get("wrong"):
            self.failures.append({key: row[key] for key in ("section", "name", "wrong", "at") if key in row})
        print(_format_row(row), flush=True)
        self._save()

    def should_skip(self, section: str, name: str) -> bool:
        """Whether to skip a part: done by another process, past the deadline, or the GPU is lost."""
        if self.gpu_lost:
            return True
        self.num_seen += 1
        if self.num_seen <= self.num_done:
            return True
        self._save()  # records where this process died, if it does
        if time.monotonic() < self.deadline:
            return False
        self.skipped.append(f"{section}: {name}")
        return True

    def _synchronize(self) -> None:
        """Wait for the GPU: kernel failures are raised here."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _probe_gpu(self) -> None:
        """After a failure, check whether the GPU is still usable."""
        try:
            self._synchronize()
        except Exception:
            self.gpu_lost = True

    def _save(self) -> None:
        if self.path is not None:
            tmp_path = self.path.with_suffix(".part")
            lists = {"rows": self.rows, "failures": self.failures, "skipped": self.skipped}
            tmp_path.write_text(
                dumps({**self.metadata, **lists, "seen": self.num_seen, "broken": self.gpu_lost})
            )
            tmp_path.replace(self.path)


def _format_row(row: dict[str, Any]) -> str:
    values = {key: value for key, value in row.items() if key not in ("section", "name", "wrong", "at")}
    figures = ", ".join(f"{key} {_format_number(value)}" for key, value in values.items())
    failure_text = f"WRONG {row['wrong']} at {row.get('at', 'its results')}; " if row.get("wrong") else ""
    return f"{row['section']:<8} {row['name']:<58} {failure_text}{figures}"


def _format_number(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
