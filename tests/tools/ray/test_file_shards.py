"""Which files a batch on Ray reads and writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from trimtab import InputError
from trimtab.tools.common.batch import Line
from trimtab.tools.ray.file_shards import Shard, shards_of


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three files of prompts, one of them deeper, and one of something else."""
    found = tmp_path / "in"
    (found / "deep").mkdir(parents=True)
    for name in ("b.jsonl", "a.jsonl", "deep/c.jsonl"):
        (found / name).write_text('"x"\n\n"y"\n')
    (found / "notes.txt").write_text("mine")
    return found


def names(shards: list[Shard], folder: Path) -> list[tuple[str, str]]:
    parent = folder.parent
    return [
        (str(each.source.relative_to(parent)), str(each.target.relative_to(parent / "out")))
        for each in shards
    ]


def test_a_folder_a_glob_and_a_file_name_their_shards(folder: Path) -> None:
    out = str(folder.parent / "out")
    expected = [("in/a.jsonl", "a.jsonl"), ("in/b.jsonl", "b.jsonl"), ("in/deep/c.jsonl", "deep/c.jsonl")]
    assert names(shards_of(str(folder), out), folder) == expected
    assert names(shards_of(f"{folder}/**/*.jsonl", out), folder) == expected
    assert names(shards_of(f"{folder}/[b]*", out), folder) == [expected[1]]
    assert names(shards_of(str(folder / "a.jsonl"), out), folder) == [expected[0]]
    assert shards_of(str(folder), out)[0].lines() == [Line(1, '"x"'), Line(3, '"y"')]


def test_what_cannot_be_read_from_or_written_to_is_refused(folder: Path) -> None:
    for source, target, says in (
        ("nowhere", "out", "'nowhere' has no files"),
        (str(folder / "*.csv"), "out", "has no files"),
        (str(folder), str(folder / "notes.txt"), "it must be a folder"),
        (str(folder), f"{folder}/deep/..", "is the folder of --input, too"),
    ):
        with pytest.raises(InputError, match=says):
            shards_of(source, target)


def test_a_row_of_parquet_is_the_line_of_json_that_it_would_be(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet  # noqa: PLC0415

    rows = [{"prompt": "x", "id": 1, "prefer": None}, {"prompt": "y", "id": 2, "prefer": ["Be kind."]}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    (shard,) = shards_of(str(tmp_path), str(tmp_path / "out"))
    assert shard.target == tmp_path / "out" / "a.parquet.jsonl"
    assert [json.loads(line.text) for line in shard.lines()] == [{"prompt": "x", "id": 1}, rows[1]]
    (tmp_path / "a.parquet").write_text("mine")
    with pytest.raises(InputError, match="is no Parquet file"):
        shard.lines()
