"""Ray Data actor with one engine, which answers chunks of prompt lines."""

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
    """The actor. `engine_factory` creates the engine in the actor's process."""

    def __init__(
        self, engine_factory: Callable[[], AsyncEngine], args: argparse.Namespace, sampling: SamplingParams
    ) -> None:
        self._engine, self._args, self._sampling = engine_factory(), args, sampling

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Answer a chunk of lines (output path, number, text) with (output path, number, answer, failed).

        If this actor dies, another one repeats the whole chunk.
        """
        chunk: list[tuple[str, int, str]] = [tuple(item) for item in json.loads(row["chunk"])]
        # Line numbers of two files may coincide, so lines are numbered by their index in the chunk.
        lines = [PromptLine(index, text) for index, (_, _, text) in enumerate(chunk)]
        results = []
        for answer in answer_lines(self._engine, lines, self._args, self._sampling):
            output_path, number, _ = chunk[answer["line"]]
            results.append(
                (output_path, number, dumps({**answer, "line": number}), bool(answer.get("error")))
            )
        return {"answered": json.dumps(results)}
