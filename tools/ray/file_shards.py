"""The files of a batch: which there are, where the answers to each go, and their lines."""

from __future__ import annotations

import glob
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ...kernels.common.errors import InputError
from ..common.batch import Line, lines_of

if TYPE_CHECKING:
    from collections.abc import Iterator

JSONL, PARQUET = ".jsonl", ".parquet"


@dataclass(frozen=True)
class Shard:
    """A file of prompts, and the file of their answers."""

    source: Path
    target: Path

    def lines(self) -> list[Line]:
        """Its lines; of a Parquet file each row as the line of JSON that it would be, without what is null.

        Raises InputError for what is no such file.
        """
        return list(_rows(self.source)) if self.source.suffix == PARQUET else lines_of(self.source)


def shards_of(source: str, target: str) -> list[Shard]:
    """The shards of a folder, a glob or one file, by name. Answers to `a.jsonl` go to `a.jsonl` of the folder
    `target`, those to `a.parquet` to `a.parquet.jsonl`.

    Raises InputError when there are no files, or the target is no folder, or the one that they are in.
    """
    folder, files = _found(source)
    if not files:
        raise InputError(
            f"--input {source!r} has no files; it must be a file, a glob or a folder of {JSONL} and {PARQUET}"
        )
    if Path(target).exists() and not Path(target).is_dir():
        raise InputError(f"--output {target!r} is a file; with --ray it must be a folder")
    if Path(target).resolve() == folder.resolve():
        raise InputError(f"--output {target!r} is the folder of --input, too; name another --output")
    return [Shard(file, Path(target) / _answers_of(file.relative_to(folder))) for file in files]


def _found(source: str) -> tuple[Path, list[Path]]:
    """The files, and the folder that they are named from."""
    path = Path(source)
    if path.is_dir():
        kinds = (JSONL, PARQUET)
        return path, sorted(each for each in path.rglob("*") if each.suffix in kinds and each.is_file())
    names = [source] if path.is_file() else sorted(glob.glob(source, recursive=True))
    files = [Path(name) for name in names if os.path.isfile(name)]
    return Path(os.path.commonpath([file.parent for file in files])) if files else path, files


def _answers_of(file: Path) -> Path:
    return file if file.suffix == JSONL else file.with_name(file.name + JSONL)


def _rows(source: Path) -> Iterator[Line]:
    import pyarrow  # noqa: PLC0415 - of the extra `ray`
    from pyarrow.parquet import ParquetFile  # noqa: PLC0415

    try:
        with ParquetFile(source) as file:
            rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
            for number, row in enumerate(rows, 1):
                values = {name: value for name, value in row.items() if value is not None}
                yield Line(number, json.dumps(values, default=str))
    except (pyarrow.ArrowException, UnicodeError) as error:
        raise InputError(f"{str(source)!r} is no Parquet file ({error})") from error
