"""Standard JSON output."""

from __future__ import annotations

import json

from trimtab.engine.utils.json import dumps


def test_nan_and_infinity_become_null() -> None:
    assert json.loads(dumps({"a": [float("nan"), (1.0, float("inf"))]})) == {"a": [None, [1.0, None]]}
