"""A row of the report: a method with its settings and its wording of weights."""

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
    """A requested method. `wording`: how a prompt expresses weights, a key of WORDINGS. `family`: the label
    shared by all wordings of a prompt."""

    label: str
    family: str
    method_spec: MethodSpec
    wording: str = "joined"

    def make_method(self, objectives: Sequence[str], weights: Weights) -> Method:
        """The method for these objectives, without those of weight 0, which change nothing.

        A method for one objective gets them as one text; equal texts make equal requests.
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
    """One row for each method, and for the prompt one for each wording."""
    rows = []
    for method_spec in method_specs:
        wordings = list(WORDINGS) if method_spec.method is Prompt else ["joined"]
        for wording in wordings:
            label = method_spec.label if wording == "joined" else f"{method_spec.label}/{wording}"
            rows.append(Row(label, method_spec.label, method_spec, wording))
    return tuple(rows)
