"""Scores that are costly, kept in a file: what a judge or a reward model has said once is not asked again."""

from __future__ import annotations

import json
from dataclasses import astuple
from hashlib import blake2b
from typing import TYPE_CHECKING, Any, Protocol

from ....engine.utils.json import dumps
from ...cli.display import progress
from ...common.jsonl import Lines
from ..study.answers_file import FOREIGN

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    from ..scorers import Scorer
    from ..scorers.answer import Answer

    Pair = tuple[Answer, Answer]

BEGINNING = b'{"scored": '
AT_ONCE = 64
"""Answers between two writes: what is lost when a run is ended."""


class Comparer(Protocol):
    """A judge of pairs."""

    name: str

    def compare(self, pairs: Sequence[Pair]) -> Sequence[str | None]:
        """ "win", "tie" or "lose" for the first of each pair; None where it cannot be said."""
        ...


class Kept:
    """What scorers said, by what they were asked.

    Raises InputError when the file holds anything else.
    """

    def __init__(self, path: Path) -> None:
        self._known: dict[str, Any] = {}
        self._file = file = Lines(path, BEGINNING, FOREIGN)
        for number, line in enumerate(file.whole(), 1):
            try:
                found = json.loads(line)
                self._known[found["scored"]] = found["as"]
            except (ValueError, KeyError, TypeError):
                raise file.foreign(number) from None
        file.cut()

    def scores(self, scorer: Scorer, answers: Sequence[Answer]) -> list[float | None]:
        """As `scorer.score`."""
        asked = {_digest(scorer.name, answer): answer for answer in answers}
        self._ask(f"trimtab: {scorer.name} …", asked, scorer.score)
        return [self._known.get(_digest(scorer.name, answer)) for answer in answers]

    def comparisons(self, judge: Comparer, pairs: Sequence[Pair]) -> list[str | None]:
        """As `judge.compare`."""
        asked = {_digest(judge.name, *pair): pair for pair in pairs}
        self._ask(f"trimtab: {judge.name} …", asked, judge.compare)
        return [self._known.get(_digest(judge.name, *pair)) for pair in pairs]

    def _ask(
        self, label: str, asked: dict[str, Any], answer: Callable[[list[Any]], Sequence[float | str | None]]
    ) -> None:
        """Asks for what is not known, some at a time. What cannot be said is asked again another time."""
        left = [digest for digest in asked if digest not in self._known]
        if not left:
            return
        with progress(label) as show:
            for start in range(0, len(left), AT_ONCE):
                part = left[start : start + AT_ONCE]
                said = answer([asked[digest] for digest in part])
                new = {digest: one for digest, one in zip(part, said, strict=True) if one is not None}
                self._known |= new
                self._file.add(dumps({"scored": digest, "as": one}) for digest, one in new.items())
                if show:
                    show(start + len(part), len(left))


def _digest(name: str, *answers: Answer) -> str:
    asked = [name, *(astuple(answer) for answer in answers)]
    return blake2b(json.dumps(asked).encode(), digest_size=16).hexdigest()
