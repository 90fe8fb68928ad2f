"""Input files of a batch, the output file of each, and their lines."""

from __future__ import annotations

import glob
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ...kernels.common.errors import InputError
from ..common.batch import PromptLine, read_prompt_lines

if TYPE_CHECKING:
    from collections.abc import Iterator

JSONL, PARQUET = ".jsonl", ".parquet"


@dataclass(frozen=True)
class FileShard:
    """A file of prompts and the file of its answers."""

    input_path: Path
    output_path: Path

    def read_lines(self) -> list[PromptLine]:
        """The input lines. A row of a Parquet file becomes a JSON object without its null values.

        Raises InputError for an invalid file.
        """
        return (
            list(_parquet_lines(self.input_path))
            if self.input_path.suffix == PARQUET
            else read_prompt_lines(self.input_path)
        )


def find_shards(input_pattern: str, output_dir: str) -> list[FileShard]:
    """The shards of a folder, a glob or one file, sorted by name. Answers to `a.jsonl` go to `a.jsonl` in
    `output_dir`, those to `a.parquet` to `a.parquet.jsonl`.

    Raises InputError if there are no files, or `output_dir` is not a folder or is the input folder.
    """
    folder, files = _find_files(input_pattern)
    if not files:
        raise InputError(
            f"--input {input_pattern!r} has no files; it must be a file, a glob or a folder of {JSONL} "
            f"and {PARQUET}"
        )
    if Path(output_dir).exists() and not Path(output_dir).is_dir():
        raise InputError(f"--output {output_dir!r} is a file; with --ray it must be a folder")
    if Path(output_dir).resolve() == folder.resolve():
        raise InputError(f"--output {output_dir!r} is the folder of --input; name another --output")
    return [FileShard(file, Path(output_dir) / _answers_path(file.relative_to(folder))) for file in files]


def _find_files(input_pattern: str) -> tuple[Path, list[Path]]:
    """The folder that file names are relative to, and the files."""
    path = Path(input_pattern)
    if path.is_dir():
        suffixes = (JSONL, PARQUET)
        return path, sorted(p for p in path.rglob("*") if p.suffix in suffixes and p.is_file())
    names = [input_pattern] if path.is_file() else sorted(glob.glob(input_pattern, recursive=True))
    files = [Path(name) for name in names if os.path.isfile(name)]
    return Path(os.path.commonpath([file.parent for file in files])) if files else path, files


def _answers_path(file: Path) -> Path:
    return file if file.suffix == JSONL else file.with_name(file.name + JSONL)


def _parquet_lines(input_path: Path) -> Iterator[PromptLine]:
    import pyarrow  # noqa: PLC0415 - needs the extra `ray`
    from pyarrow.parquet import ParquetFile  # noqa: PLC0415

    try:
        with ParquetFile(input_path) as file:
            rows = (row for batch in file.iter_batches() for row in batch.to_pylist())
            for number, row in enumerate(rows, 1):
                values = {name: value for name, value in row.items() if value is not None}
                yield PromptLine(number, json.dumps(values, default=str))
    except (pyarrow.ArrowException, UnicodeError) as error:
        raise InputError(f"{str(input_path)!r} is not a Parquet file ({error})") from error
