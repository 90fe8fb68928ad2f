"""An aim: an objective, and the scorer that says how far an answer fulfils it."""

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
    """An objective and its scorer. `text` None: the objective is the question's own, its `place`-th
    preference.
    """

    text: str | None
    scorer: str
    sign: int = 1
    place: int = 0

    @property
    def label(self) -> str:
        """What a table calls it: the scorer, with a minus where less is better."""
        preference_number = "" if self.text is not None else f" {self.place + 1}"
        return ("-" if self.sign < 0 else "") + self.scorer + preference_number

    def objective_text(self, question: Question) -> str:
        """The objective's text for this question."""
        return question.preferences[self.place] if self.text is None else self.text


def parse_target(text: str) -> Target:
    """`"Be brief.=-length"` → objective, scorer, and that less is better: split where a scorer's name
    follows.

    Without an objective (`"=judge:URL"`) it stands for each of a question's own preferences.
    Raises InputError when no scorer is named.
    """
    # The last "=" that a scorer follows: an argument such as a URL's query may hold another.
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
    """The aims as typed. Raises InputError when there are none, or the questions lack preferences."""
    targets = [parse_target(text) for text in texts]
    if not targets:
        raise InputError(
            'there is no --aim; say what is wished for and what measures it: "Be brief.=-length"'
        )
    if all(target.text is not None for target in targets):
        return tuple(targets)
    if len(targets) > 1:
        raise InputError(
            "an --aim without an objective stands for all preferences of a question; give it alone"
        )
    num_preferences = len(questions[0].preferences)
    for question in questions:
        if not question.preferences or len(question.preferences) != num_preferences:
            raise InputError(
                f"question {question.index} has {len(question.preferences)} preferences; for an --aim "
                "without an objective all questions must have equally many, and at least one"
            )
    return tuple(Target(None, targets[0].scorer, targets[0].sign, index) for index in range(num_preferences))
