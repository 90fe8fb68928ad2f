"""On-disk cache of scores from a judge or a reward model."""

from __future__ import annotations

import json
from dataclasses import astuple
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Protocol

from ....engine.utils.json import dumps
from ...cli.display import progress
from ...common.jsonl import JSONLFile
from ..study.answers_file import MISMATCH_TEXT

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from ..scorers import Scorer
    from ..scorers.answer import Answer

    Pair = tuple[Answer, Answer]

LINE_PREFIX = b'{"scored": '
WRITE_BATCH_SIZE = 64
"""Answers scored between two writes: the most that an interrupted run loses."""


class PairwiseJudge(Protocol):
    """Compares pairs of answers."""

    name: str

    def compare(self, pairs: Sequence[Pair]) -> Sequence[str | None]:
        """ "win", "tie" or "lose" for the first answer of each pair; None without a verdict."""
        ...


class ScoreCache:
    """Scores and comparisons by a digest of scorer and answers.

    Raises InputError for a file with other lines.
    """

    def __init__(self, path: Path) -> None:
        self._cached: dict[str, Any] = {}
        self._file = file = JSONLFile(path, LINE_PREFIX, MISMATCH_TEXT)
        for line_number, line in enumerate(file.complete_lines(), 1):
            try:
                entry = json.loads(line)
                self._cached[entry["scored"]] = entry["as"]
            except (ValueError, KeyError, TypeError):
                raise file.mismatch(line_number) from None
        file.truncate_partial()

    def get_scores(self, scorer: Scorer, answers: Sequence[Answer]) -> list[float | None]:
        """`scorer.score(answers)`, cached."""
        answers_by_digest = {_digest(scorer.name, answer): answer for answer in answers}
        self._fill(f"trimtab: {scorer.name} …", answers_by_digest, scorer.score)
        return [self._cached.get(_digest(scorer.name, answer)) for answer in answers]

    def get_comparisons(self, judge: PairwiseJudge, pairs: Sequence[Pair]) -> list[str | None]:
        """`judge.compare(pairs)`, cached."""
        pairs_by_digest = {_digest(judge.name, *pair): pair for pair in pairs}
        self._fill(f"trimtab: {judge.name} …", pairs_by_digest, judge.compare)
        return [self._cached.get(_digest(judge.name, *pair)) for pair in pairs]

    def _fill(
        self, label: str, items: dict[str, Any], evaluate: Callable[[list[Any]], Sequence[float | str | None]]
    ) -> None:
        """Evaluate the items not cached, in batches. None is not cached, so a later run tries again."""
        missing = [digest for digest in items if digest not in self._cached]
        if not missing:
            return
        with progress(label) as update_progress:
            for start in range(0, len(missing), WRITE_BATCH_SIZE):
                batch = missing[start : start + WRITE_BATCH_SIZE]
                results = evaluate([items[digest] for digest in batch])
                new_results = {
                    digest: one for digest, one in zip(batch, results, strict=True) if one is not None
                }
                self._cached |= new_results
                self._file.append(dumps({"scored": digest, "as": one}) for digest, one in new_results.items())
                if update_progress:
                    update_progress(start + len(batch), len(missing))


def _digest(name: str, *answers: Answer) -> str:
    key_fields = [name, *(astuple(answer) for answer in answers)]
    return blake2b(json.dumps(key_fields).encode(), digest_size=16).hexdigest()
