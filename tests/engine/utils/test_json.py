"""JSON that any reader takes."""

from __future__ import annotations

import json

from trimtab.engine.utils.json import dumps


def test_numbers_that_json_lacks_are_null() -> None:
    assert json.loads(dumps({"a": [float("nan"), (1.0, float("inf"))]})) == {"a": [None, [1.0, None]]}
