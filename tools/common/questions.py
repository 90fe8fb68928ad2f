"""Question datasets: the bundled one, or a file in JSON or JSON lines."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...kernels.common.errors import InputError, short_repr

if TYPE_CHECKING:
    from collections.abc import Sequence

BUILTIN_FILE = Path(__file__).with_name("questions.json")
TEXT_KEYS = ("question", "prompt", "instruction")
PREFERENCE_LIST_KEYS = ("preferences", "preference_set", "rubric")
PREFERENCE_KEYS = ("preference", "criteria", "description", "text")
"""Keys of common datasets; the first present key is used."""
HALVES = ("both", "first", "second")


@dataclass(frozen=True)
class Question:
    """A question, its index in its file, and the user's preferences, if the file has any."""

    index: int
    text: str
    preferences: tuple[str, ...] = ()


def read_questions(path: str | None, half: str = "both") -> tuple[Question, ...]:
    """The questions of a file; None reads the bundled ones.

    half: "first" selects even indices, "second" odd ones. A row is a string or an object with a `question`
    (or `prompt`, `instruction`), and optionally an `index` and `preferences`: strings, or objects with a
    `preference`. Raises InputError for anything else.
    """
    file = BUILTIN_FILE if path is None else Path(path)
    questions = tuple(_parse_question(row, row_index, file) for row_index, row in enumerate(_read_rows(file)))
    indices = [question.index for question in questions]
    if len(set(indices)) < len(indices):
        raise InputError(f"{str(file)!r} has two questions with the same index; each index must be unique")
    selected = [q for q in questions if half == "both" or q.index % 2 == (half == "second")]
    if not selected:
        raise InputError(
            f"{str(file)!r} has no questions" + ("" if half == "both" else f" in its {half} half")
        )
    return tuple(selected)


def questions_digest(questions: Sequence[Question]) -> str:
    """A digest that identifies a set of questions."""
    return blake2b(json.dumps([asdict(q) for q in questions]).encode(), digest_size=16).hexdigest()


def _read_rows(file: Path) -> list[Any]:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{str(file)!r} is not UTF-8 text ({error.reason} at byte {error.start})") from None
    try:
        data = json.loads(text)
        return data if isinstance(data, list) else [data]
    except (ValueError, RecursionError):
        pass
    try:
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{str(file)!r} is neither a JSON list of questions nor JSON lines ({error})"
        ) from None


def _parse_question(row: Any, row_index: int, file: Path) -> Question:
    values = {"question": row} if isinstance(row, str) else row
    text = _first_value(values, TEXT_KEYS) if isinstance(values, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise InputError(
            f"row {row_index} of {str(file)!r} is {short_repr(row)}; it must have a question, a string"
        )
    index = values.get("index", row_index)
    if isinstance(index, bool) or not isinstance(index, int):
        raise InputError(
            f"row {row_index} of {str(file)!r} has the index {short_repr(index)}; it must be an integer"
        )
    raw_preferences = _first_value(values, PREFERENCE_LIST_KEYS) or []
    items = raw_preferences if isinstance(raw_preferences, list) else [None]
    preferences: list[Any] = [_first_value(p, PREFERENCE_KEYS) if isinstance(p, dict) else p for p in items]
    if not all(isinstance(preference, str) and preference.strip() for preference in preferences):
        raise InputError(
            f"row {row_index} of {str(file)!r} has preferences {short_repr(raw_preferences)}; they must "
            f"be strings"
        )
    return Question(index, text, tuple(preferences))


def _first_value(values: dict[str, Any], keys: Sequence[str]) -> Any:
    return next((values[name] for name in keys if name in values), None)
