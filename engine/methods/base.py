"""A decoding method: which wishes become branches, and the one `Program` row that it compiles to.

A method is data; the decode loop knows nothing of it but that row. To make your own, subclass `Method`, add
fields, and write `program`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from ...kernels.common.errors import InputError, SteeringWarning, quoted
from ...kernels.steering.coefficients import Program
from ..utils.fields import check_fields, option, refusal
from .objective import Objective

if TYPE_CHECKING:
    from typing_extensions import Self

MAX_STRENGTH = 1000.0
PLACEMENTS = ("system", "user")


@dataclass(frozen=True)
class Method:
    """What all methods share: the objectives, and where their texts go in the prompt.

    `wishes` is "none", "one" or "many". A method for one preference that is given several objectives
    joins their texts with a space in one branch. `name` is the method's name on the command line. `presets`
    are settings by name that are not the published ones, see `preset`.
    """

    wishes: ClassVar[str] = "many"
    name: ClassVar[str] = "method"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}

    objectives: tuple[Objective, ...] = ()
    placement: str = option(
        "system", "add objectives to the system text or to the last user turn", PLACEMENTS, kw_only=True
    )

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.name = "".join(f"-{c.lower()}" if c.isupper() else c for c in cls.__name__).lstrip("-")

    def __post_init__(self) -> None:
        check_fields(self, f" of {self.name}")
        _check_objectives(self.objectives)
        if self.wishes == "none" and self.objectives:
            raise InputError(
                f"{self.name} takes no objectives, but was given {quoted(self.objectives[0].text)}"
            )
        if self.wishes != "none" and not self.objectives:
            raise InputError(f"{self.name} needs at least one objective and was given none")
        # asked for here, so that a hyperparameter out of range is refused now and not at the first token
        if not isinstance(self.compiled, Program):
            raise refusal(f"the program of {self.name}", self.compiled, "of type Program")
        for doubt in self.doubts():
            warnings.warn(doubt, SteeringWarning, stacklevel=3)

    @classmethod
    def preset(cls, preset: str, objectives: Sequence[Objective], **settings: Any) -> Self:
        """The method with the settings of a preset, and others in their place where they are given.

        Raises InputError when the method has no preset of that name.
        """
        return cls(tuple(objectives), **{**cls.preset_settings(preset), **settings})

    @classmethod
    def preset_settings(cls, preset: str) -> Mapping[str, Any]:
        """The settings of a preset. Raises InputError when the method has none of that name."""
        if preset not in cls.presets:
            there = f"presets are {', '.join(cls.presets)}" if cls.presets else "it has none"
            raise InputError(f"{cls.name} has no preset {quoted(preset)}; {there}", "preset")
        return cls.presets[preset]

    def branches(self) -> tuple[str, ...]:
        """The wish of each objective branch, 1..K."""
        if self.wishes == "many":
            return tuple(o.text for o in self.objectives)
        return (" ".join(o.text for o in self._counted),) if self._counted else ()

    def weights(self) -> tuple[float, ...]:
        """w⁰, the weight of each objective branch: non-negative, sum 1."""
        if self.wishes == "one":
            return (1.0,)
        top = max((o.weight for o in self.objectives), default=1.0)
        shares = [o.weight / top for o in self.objectives]  # by the largest first: weights may be 1e-300
        total = sum(shares)
        return tuple(share / total for share in shares)

    def program(self) -> Program:
        """The numeric row of this method. Raises InputError when a hyperparameter is out of range."""
        raise NotImplementedError

    @cached_property
    def compiled(self) -> Program:
        """What `program` gives, worked out once."""
        return self.program()

    def doubts(self) -> Iterator[str]:
        """What may not be meant, in sentences: warned of once, when the method is made."""
        if self.wishes == "one" and len({o.weight for o in self._counted}) > 1:
            yield (
                f"{self.name} steers toward one preference, so it joins the {len(self._counted)} objectives "
                "in one and ignores their uneven weights"
            )

    @property
    def _counted(self) -> list[Objective]:
        return [o for o in self.objectives if o.weight > 0]

    def require(self, name: str, ok: bool, right: str) -> None:
        """Refuses the field `name` in one sentence unless `ok`."""
        if not ok:
            raise refusal(f"{name} of {self.name}", getattr(self, name), right, name)

    def positive(self, *names: str) -> None:
        """Refuses each named field that is not a finite number above 0."""
        for name in names:
            value = getattr(self, name)
            self.require(name, math.isfinite(value) and value > 0, "a finite number above 0")


def _check_objectives(objectives: tuple[Objective, ...]) -> None:
    seen: set[str] = set()
    for objective in objectives:
        if objective.text in seen:
            raise InputError(
                f"objective {quoted(objective.text)} is given twice; give it once with its whole weight"
            )
        seen.add(objective.text)
    if objectives and not any(o.weight > 0 for o in objectives):
        raise InputError("the weights of all objectives are 0; at least one must be above 0")


def contrast(method: Method, a: float, kl_budget: float | None = None, **extra: Any) -> Program:
    """The row base = 1 − a, scale = a, in which most methods fit (strength a along the ray b + a (m − b)).

    Raises InputError when |a| is beyond what float32 scores carry, or when a trust region is asked of a < 1.
    """
    if not abs(a) <= MAX_STRENGTH:
        values = {k: v for k, v in vars(method).items() if type(v) in (int, float)}
        given = ", ".join(f"{name}={value!r}" for name, value in values.items())
        raise InputError(
            f"{method.name} with {given} has strength a = {a:.6g}; it must be at most {MAX_STRENGTH:g}"
        )
    if kl_budget is None:
        return Program(base=1 - a, scale=a, **extra)
    if not (math.isfinite(kl_budget) and kl_budget > 0):
        raise InputError(
            f"kl_budget of {method.name} is {kl_budget!r}; it must be a finite number above 0, or none"
        )
    if a < 1:
        raise InputError(
            f"kl_budget of {method.name} needs a strength of at least 1, but the strength is {a:.6g}"
        )
    return Program(base=1 - a, scale=a, kl_budget=kl_budget, **extra)
