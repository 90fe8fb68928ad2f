"""The append-only file of answers, answers.jsonl, from which an interrupted run resumes.

A finished run also leaves it compressed, small enough to be kept with a report: a folder with the compressed
file alone is one that a run can go on from.
"""

from __future__ import annotations

import gzip
import json
import os
import zlib
from typing import TYPE_CHECKING

from ....engine.utils.json import dumps
from ....kernels.common.errors import InputError
from ...common.jsonl import JSONLFile
from .answer_record import AnswerRecord

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

LINE_PREFIX = b'{"key": '
MISMATCH_TEXT = "not a study record"
"""How an error describes a line of another format."""

Answers = dict[str, list[AnswerRecord]]
"""The n answers of each cell, by cell key."""


def open_answers_file(path: Path) -> JSONLFile:
    """Open the file of answers."""
    return JSONLFile(path, LINE_PREFIX, MISMATCH_TEXT)


def packed_path(path: Path) -> Path:
    """The compressed file of answers beside `path`."""
    return path.with_name(f"{path.name}.gz")


def pack(path: Path) -> None:
    """Write the compressed file; equal answers give equal bytes."""
    part = path.with_name(f"{path.name}.gz.part")
    part.write_bytes(gzip.compress(path.read_bytes(), mtime=0))
    os.replace(part, packed_path(path))


def unpack(path: Path) -> None:
    """Write `path` from the compressed file if it is missing. Raises InputError for a damaged one."""
    packed = packed_path(path)
    if path.exists() or not packed.exists():
        return
    try:
        data = gzip.decompress(packed.read_bytes())
    except (OSError, EOFError, zlib.error) as error:
        raise InputError(
            f"{str(packed)!r} is not a whole gzip file ({error}); restore or remove it"
        ) from None
    part = path.with_name(f"{path.name}.part")
    part.write_bytes(data)
    os.replace(part, path)


def read_answers(path: Path, keys: Collection[str], num_samples: int) -> Answers:
    """Read the answers of an earlier run, leaving out cells with fewer than `num_samples` answers.

    Raises InputError for a line of another format, or of a cell that this study does not have.
    """
    records_by_key: dict[str, dict[int, AnswerRecord]] = {}
    file = open_answers_file(path)
    for line_number, line in enumerate(file.complete_lines(), 1):
        record = _parse_record(line, file.mismatch(line_number))
        if record.key not in keys:
            raise InputError(
                f"line {line_number} of {str(path)!r} answers a request that is not in this study; "
                f"name another --output"
            )
        records_by_key.setdefault(record.key, {})[record.sample] = record
    return {
        key: [records[sample] for sample in range(num_samples)]
        for key, records in records_by_key.items()
        if records.keys() >= set(range(num_samples))
    }


def append_answers(path: Path, records: list[AnswerRecord]) -> None:
    """Append all answers of a cell."""
    open_answers_file(path).append(dumps(record.to_dict()) for record in records)


def _parse_record(line: bytes, mismatch: InputError) -> AnswerRecord:
    try:
        return AnswerRecord(**json.loads(line))
    except (ValueError, TypeError):
        raise mismatch from None
