"""Questions to ask: the project's own, or those of a file in JSON or JSON lines."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...kernels.common.errors import InputError, quoted

if TYPE_CHECKING:
    from collections.abc import Sequence

OWN = Path(__file__).with_name("questions.json")
TEXTS = ("question", "prompt", "instruction")
PREFERENCES = ("preferences", "preference_set", "rubric")
PREFERENCE = ("preference", "criteria", "description", "text")
"""Names under which files in use have these, the first that is there counts."""
HALVES = ("both", "first", "second")


@dataclass(frozen=True)
class Question:
    """A question, its number in its file, and what its asker prefers, where the file says so."""

    index: int
    text: str
    preferences: tuple[str, ...] = ()


def read(path: str | None, half: str = "both") -> tuple[Question, ...]:
    """The questions of a file, None for the project's own; a half is that of the even or the odd indices.

    A row is an object with a `question` (or `prompt`, `instruction`), and perhaps an `index` and
    `preferences`: texts, or objects with a `preference`; or just a text.
    Raises InputError when the file holds anything else.
    """
    file = OWN if path is None else Path(path)
    found = tuple(_question(row, place, file) for place, row in enumerate(_rows(file)))
    indices = [question.index for question in found]
    if len(set(indices)) < len(indices):
        raise InputError(f"{str(file)!r} has two questions of the same index; each must have its own")
    kept = [q for q in found if half == "both" or q.index % 2 == (half == "second")]
    if not kept:
        raise InputError(
            f"{str(file)!r} has no questions" + ("" if half == "both" else f" in its {half} half")
        )
    return tuple(kept)


def digest(questions: Sequence[Question]) -> str:
    """What tells these questions from others."""
    return blake2b(json.dumps([asdict(q) for q in questions]).encode(), digest_size=16).hexdigest()


def _rows(file: Path) -> list[Any]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{str(file)!r} is no UTF-8 text ({error.reason} at byte {error.start})") from None
    try:
        whole = json.loads(text)
        return whole if isinstance(whole, list) else [whole]
    except (ValueError, RecursionError):
        pass
    try:
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{str(file)!r} is neither a JSON list of questions nor one a line ({error})"
        ) from None


def _question(row: Any, place: int, file: Path) -> Question:
    values = {"question": row} if isinstance(row, str) else row
    text = _first(values, TEXTS) if isinstance(values, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"row {place} of {str(file)!r} is {quoted(row)}; it must have a question, as a text")
    index = values.get("index", place)
    if isinstance(index, bool) or not isinstance(index, int):
        raise InputError(
            f"row {place} of {str(file)!r} has the index {quoted(index)}; it must be a whole number"
        )
    found = _first(values, PREFERENCES) or []
    listed = found if isinstance(found, list) else [None]
    wishes: list[Any] = [_first(p, PREFERENCE) if isinstance(p, dict) else p for p in listed]
    if not all(isinstance(wish, str) and wish.strip() for wish in wishes):
        raise InputError(f"row {place} of {str(file)!r} has preferences {quoted(found)}; they must be texts")
    return Question(index, text, tuple(wishes))


def _first(values: dict[str, Any], names: Sequence[str]) -> Any:
    return next((values[name] for name in names if name in values), None)
