"""An objective in plain language, and its weight."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...kernels.common.errors import InputError, short_repr
from ..utils.fields import invalid_value, validate_types


@dataclass(frozen=True)
class Objective:
    """One objective. Its weight is an intensity: 0 leaves it out, 1 is full, above 1 is more.

    The published methods normalise the weights of a request to sum 1, as their papers do.
    """

    text: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        validate_types(self, " of an objective")
        if not self.text.strip():
            raise InputError("an objective's text is empty; describe the objective in words")
        if not math.isfinite(self.weight) or self.weight < 0:
            raise invalid_value(
                f"the weight of objective {short_repr(self.text)}", self.weight, "a finite number ≥ 0"
            )
