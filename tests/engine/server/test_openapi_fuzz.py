"""Fuzz the API from its OpenAPI schema; no request may cause a server error."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from trimtab.engine import AsyncEngine
from trimtab.engine.server import ServerConfig, create_app

from ...helpers.tiny_model import is_idle


@pytest.fixture(scope="module")
def schema(tiny_folder: Path) -> Iterator[schemathesis.BaseSchema]:
    engine = AsyncEngine.from_pretrained(str(tiny_folder), kv_cache_memory="1MiB", max_model_len=96)
    yield schemathesis.openapi.from_asgi(
        "/openapi.json", create_app(engine, ServerConfig(request_timeout=20))
    )
    assert is_idle(engine)
    engine.shutdown()


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_neither_valid_nor_invalid_schema_inputs_break_the_server(
    schema: schemathesis.BaseSchema, mode: GenerationMode
) -> None:
    operations = [each.ok() for each in schema.get_all_operations()]
    assert "POST /v1/chat/completions" in {operation.label for operation in operations}
    statuses: Counter[tuple[str, int]] = Counter()
    for operation in operations:

        @settings(max_examples=40, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(
            case=operation.as_strategy(generation_mode=mode),
            kept_fields=st.sets(st.integers(0, 30), max_size=2),
        )
        def call(case: schemathesis.Case, kept_fields: set[int]) -> None:
            if mode == GenerationMode.POSITIVE and isinstance(case.body, dict):
                # with more optional fields, one of them is nearly always out of range
                named = [name for index, name in enumerate(sorted(case.body)) if index in kept_fields]
                case.body = {n: case.body[n] for n in [*named, "messages", "prompt"] if n in case.body}
            response = case.call()
            statuses[case.operation.label, response.status_code] += 1
            assert response.status_code < 500, response.text
            if response.status_code != 200:
                assert list(json.loads(response.content)) == ["error"]

        with suppress(Unsatisfiable):  # a route without arguments has no invalid calls
            call()
    expected = 200 if mode == GenerationMode.POSITIVE else 400
    paths = ("chat/completions", "completions", "steer/preview")
    assert sum(statuses[f"POST /v1/{path}", expected] for path in paths) > 5, statuses
