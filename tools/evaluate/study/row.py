"""A row of the report: a method with its settings, and how it is told of weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ....engine.methods.builtin import Prompt
from ....engine.methods.objective import Objective
from .prompt_wordings import WORDINGS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ....engine.methods.base import Method
    from ...cli.method_args import Choice
    from .grid import Weights


@dataclass(frozen=True)
class Row:
    """A method as asked for. `wording` says how a prompt puts weights into words; rows of one column, such
    as all wordings of a prompt, have its `family`."""

    label: str
    family: str
    choice: Choice
    wording: str = "joined"

    def method(self, wishes: Sequence[str], weights: Weights) -> Method:
        """The method toward these wishes; a wish of weight 0 changes nothing and is left out.

        A method for one preference gets one text, so that what asks for the same is the same request.
        """
        kind = self.choice.method.wishes
        asked = [(wish, weight) for wish, weight in zip(wishes, weights, strict=True) if weight > 0]
        if kind == "none":
            return self.choice.build(())
        if kind == "many":
            return self.choice.build([Objective(wish, weight) for wish, weight in asked])
        if len(asked) == 1:
            return self.choice.build([Objective(asked[0][0])])
        text = WORDINGS[self.wording]([wish for wish, _ in asked], [weight for _, weight in asked])
        return self.choice.build([Objective(text)])


def rows(columns: Sequence[Choice]) -> tuple[Row, ...]:
    """A row for each column, and for a prompt one for each way to say weights."""
    found = []
    for choice in columns:
        ways = list(WORDINGS) if choice.method is Prompt else ["joined"]
        for way in ways:
            label = choice.label if way == "joined" else f"{choice.label}/{way}"
            found.append(Row(label, choice.label, choice, way))
    return tuple(found)
