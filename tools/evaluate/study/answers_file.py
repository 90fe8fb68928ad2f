"""The file of answers, answers.jsonl: what is in it stays, and a run goes on where it was left."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from ....engine.utils.json import dumps
from ....kernels.common.errors import InputError
from ...common.jsonl import Lines
from .answer_record import Record

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

BEGINNING = b'{"key": '
FOREIGN = "not of a study"
"""What another line is called."""

Answers = dict[str, list[Record]]
"""By key, the n answers of a cell."""


def of(path: Path) -> Lines:
    """The file as lines."""
    return Lines(path, BEGINNING, FOREIGN)


def read(path: Path, keys: Collection[str], samples: int) -> Answers:
    """The answers of an earlier run; none of those of which a crash left only some.

    Raises InputError when the file holds anything else, or answers of another study.
    """
    found: dict[str, dict[int, Record]] = {}
    file = of(path)
    for number, line in enumerate(file.whole(), 1):
        record = _record(line, file.foreign(number))
        if record.key not in keys:
            raise InputError(
                f"line {number} of {str(path)!r} answers what this study does not ask; name another --output"
            )
        found.setdefault(record.key, {})[record.sample] = record
    return {
        key: [records[sample] for sample in range(samples)]
        for key, records in found.items()
        if records.keys() >= set(range(samples))
    }


def write(path: Path, records: list[Record]) -> None:
    """Adds all answers of a cell."""
    of(path).add(dumps(record.described()) for record in records)


def _record(line: bytes, foreign: InputError) -> Record:
    try:
        return Record(**json.loads(line))
    except (ValueError, TypeError):
        raise foreign from None
