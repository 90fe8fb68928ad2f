"""One engine of several that answer lines from files, some dozen at a time."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from ...engine.utils.json import dumps
from ..common.batch import PromptLine, answer_lines

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from ...engine.async_engine import AsyncEngine
    from ...engine.sampling_params import SamplingParams


class BatchActor:
    """The actor of Ray Data. `opening` makes the engine where the actor is."""

    def __init__(
        self, engine_factory: Callable[[], AsyncEngine], args: argparse.Namespace, sampling: SamplingParams
    ) -> None:
        self._engine, self._args, self._sampling = engine_factory(), args, sampling

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """A chunk of lines, [target, number, text] each, to [target, number, answer, failed] each. It is
        answered whole or, when this actor dies, whole by another."""
        chunk: list[tuple[str, int, str]] = [tuple(item) for item in json.loads(row["chunk"])]
        # Numbers of two files may be the same, places in the chunk are not.
        lines = [PromptLine(index, text) for index, (_, _, text) in enumerate(chunk)]
        results = []
        for answer in answer_lines(self._engine, lines, self._args, self._sampling):
            output_path, number, _ = chunk[answer["line"]]
            results.append(
                (output_path, number, dumps({**answer, "line": number}), bool(answer.get("error")))
            )
        return {"answered": json.dumps(results)}
