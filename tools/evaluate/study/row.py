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
    from ...cli.method_args import MethodSpec
    from .grid import Weights


@dataclass(frozen=True)
class Row:
    """A method as asked for. `wording` says how a prompt puts weights into words; rows of one column, such
    as all wordings of a prompt, have its `family`."""

    label: str
    family: str
    method_spec: MethodSpec
    wording: str = "joined"

    def make_method(self, objectives: Sequence[str], weights: Weights) -> Method:
        """The method toward these objectives; an objective of weight 0 changes nothing and is left out.

        A method for one preference gets one text, so that what asks for the same is the same request.
        """
        arity = self.method_spec.method.objective_arity
        weighted_objectives = [
            (text, weight) for text, weight in zip(objectives, weights, strict=True) if weight > 0
        ]
        if arity == "none":
            return self.method_spec.build(())
        if arity == "many":
            return self.method_spec.build([Objective(text, weight) for text, weight in weighted_objectives])
        if len(weighted_objectives) == 1:
            return self.method_spec.build([Objective(weighted_objectives[0][0])])
        text = WORDINGS[self.wording](
            [text for text, _ in weighted_objectives], [weight for _, weight in weighted_objectives]
        )
        return self.method_spec.build([Objective(text)])


def make_rows(method_specs: Sequence[MethodSpec]) -> tuple[Row, ...]:
    """A row for each column, and for a prompt one for each way to say weights."""
    rows = []
    for method_spec in method_specs:
        wordings = list(WORDINGS) if method_spec.method is Prompt else ["joined"]
        for wording in wordings:
            label = method_spec.label if wording == "joined" else f"{method_spec.label}/{wording}"
            rows.append(Row(label, method_spec.label, method_spec, wording))
    return tuple(rows)
