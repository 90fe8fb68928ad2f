"""docs/promises.md names only tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "promises.md").read_text(encoding="utf-8")
ROWS = [line for line in PAGE.splitlines() if re.search(r"`(tests/|test_)", line) and line.startswith("|")]


@pytest.mark.parametrize("row", ROWS)
def test_every_promise_names_existing_tests(row: str) -> None:
    """A test name without a file belongs to the file named before it."""
    text = ""
    for file, name in re.findall(r"`(?:(tests/[\w/.]+\.py))?(?:::)?(test_\w+)?`", row):
        text = (ROOT / file).read_text(encoding="utf-8") if file else text
        assert not name or f"def {name}(" in text, name
    assert text


def test_the_table_of_promises_is_found() -> None:
    assert len(ROWS) > 25
