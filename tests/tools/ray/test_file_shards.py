"""Input and output files of a batch on Ray."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from trimtab import InputError
from trimtab.tools.common.batch import PromptLine
from trimtab.tools.ray.file_shards import FileShard, find_shards


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with three files of prompts, one in a subfolder, and an unrelated file."""
    root = tmp_path / "in"
    (root / "deep").mkdir(parents=True)
    for name in ("b.jsonl", "a.jsonl", "deep/c.jsonl"):
        (root / name).write_text('"x"\n\n"y"\n')
    (root / "notes.txt").write_text("mine")
    return root


def shard_names(shards: list[FileShard], folder: Path) -> list[tuple[str, str]]:
    parent = folder.parent
    return [
        (str(each.input_path.relative_to(parent)), str(each.output_path.relative_to(parent / "out")))
        for each in shards
    ]


def test_shards_of_a_folder_a_glob_and_a_file(folder: Path) -> None:
    out = str(folder.parent / "out")
    expected = [("in/a.jsonl", "a.jsonl"), ("in/b.jsonl", "b.jsonl"), ("in/deep/c.jsonl", "deep/c.jsonl")]
    assert shard_names(find_shards(str(folder), out), folder) == expected
    assert shard_names(find_shards(f"{folder}/**/*.jsonl", out), folder) == expected
    assert shard_names(find_shards(f"{folder}/[b]*", out), folder) == [expected[1]]
    assert shard_names(find_shards(str(folder / "a.jsonl"), out), folder) == [expected[0]]
    assert find_shards(str(folder), out)[0].read_lines() == [PromptLine(1, '"x"'), PromptLine(3, '"y"')]


def test_missing_inputs_and_invalid_outputs_are_refused(folder: Path) -> None:
    for source, target, message in (
        ("nowhere", "out", "'nowhere' has no files"),
        (str(folder / "*.csv"), "out", "has no files"),
        (str(folder), str(folder / "notes.txt"), "it must be a folder"),
        (str(folder), f"{folder}/deep/..", "is the folder of --input;"),
    ):
        with pytest.raises(InputError, match=message):
            find_shards(source, target)


def test_a_parquet_row_becomes_its_json_line(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet  # noqa: PLC0415

    rows = [{"prompt": "x", "id": 1, "prefer": None}, {"prompt": "y", "id": 2, "prefer": ["Be kind."]}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    (shard,) = find_shards(str(tmp_path), str(tmp_path / "out"))
    assert shard.output_path == tmp_path / "out" / "a.parquet.jsonl"
    assert [json.loads(line.text) for line in shard.read_lines()] == [{"prompt": "x", "id": 1}, rows[1]]
    (tmp_path / "a.parquet").write_text("mine")
    with pytest.raises(InputError, match="is not a Parquet file"):
        shard.read_lines()
