"""Reading a JSON file of a model folder: an object, {} if missing, else a one-line error."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from trimtab.kernels.common.errors import InputError
from trimtab.models.common.json_files import read_json

if TYPE_CHECKING:
    from pathlib import Path


def test_a_json_object_is_read_and_a_missing_file_is_empty(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"é": [1, null]}', encoding="utf-8")
    assert read_json(tmp_path / "a.json") == {"é": [1, None]}
    assert read_json(tmp_path / "b.json") == {}
    assert read_json(tmp_path / "a.json" / "b.json") == {}


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"{'a'", "is not valid JSON"),
        (b"", "is not valid JSON"),
        (b"[1]", "contains a JSON list; it must be an object"),
        (b"\xff{}", "is not valid UTF-8"),
        (b'{"a": ' * 100_000, "is JSON that is nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not valid JSON"),
    ],
)
def test_any_other_file_content_is_a_one_line_error(tmp_path: Path, content: bytes, match: str) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(InputError, match=rf"config\.json' {match}") as caught:
        read_json(tmp_path / "config.json")
    assert "\n" not in str(caught.value)


def test_a_folder_instead_of_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    with pytest.raises(InputError, match=r"config\.json' is not a regular file"):
        read_json(tmp_path / "config.json")
