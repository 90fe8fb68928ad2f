"""An objective and the scorer that measures it, from `--aim`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ....kernels.common.errors import InputError
from ..scorers import SCORERS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ...common.questions import Question


@dataclass(frozen=True)
class Target:
    """An objective and its scorer. `sign` is -1 if a lower score is better. If `text` is None, the objective
    is the question's preference with index `place`.
    """

    text: str | None
    scorer: str
    sign: int = 1
    place: int = 0

    @property
    def label(self) -> str:
        """The name in tables: the scorer, with a minus if lower is better."""
        preference_number = "" if self.text is not None else f" {self.place + 1}"
        return ("-" if self.sign < 0 else "") + self.scorer + preference_number

    def objective_text(self, question: Question) -> str:
        """The objective's text for this question."""
        return question.preferences[self.place] if self.text is None else self.text


def parse_target(text: str) -> Target:
    """Parse `OBJECTIVE=SCORER` or `OBJECTIVE=-SCORER`, which means that lower is better.

    Without an objective (`"=judge:URL"`) it means each of a question's preferences.
    Raises InputError without the name of a scorer.
    """
    # Split at the last "=" before a scorer's name: its argument, such as a URL's query, may contain another.
    for end in [i for i in range(len(text) - 1, -1, -1) if text[i] == "="]:
        scorer = text[end + 1 :].strip()
        name = scorer.removeprefix("-")
        if name.partition(":")[0] in SCORERS:
            return Target(text[:end].strip() or None, name, -1 if scorer.startswith("-") else 1)
    raise InputError(
        f'--aim is {text!r}; it must be "OBJECTIVE=SCORER", such as "Be brief.=-length"; scorers are '
        + ", ".join(SCORERS)
    )


def parse_targets(texts: Sequence[str], questions: Sequence[Question]) -> tuple[Target, ...]:
    """Parse the values of --aim. Raises InputError if there are none, or questions lack preferences."""
    targets = [parse_target(text) for text in texts]
    if not targets:
        raise InputError('--aim is required: an objective and its scorer, such as "Be brief.=-length"')
    if all(target.text is not None for target in targets):
        return tuple(targets)
    if len(targets) > 1:
        raise InputError(
            "an --aim without an objective means all preferences of a question; it must be the only --aim"
        )
    num_preferences = len(questions[0].preferences)
    for question in questions:
        if not question.preferences or len(question.preferences) != num_preferences:
            raise InputError(
                f"question {question.index} has {len(question.preferences)} preferences; for an --aim "
                "without an objective all questions must have the same number, at least 1"
            )
    return tuple(Target(None, targets[0].scorer, targets[0].sign, index) for index in range(num_preferences))
