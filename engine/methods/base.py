"""Base class of the decoding methods: objective branches and the coefficients that mix their logits.

A method is data: the decode loop reads only its `SteeringCoefficients`. To write your own,
subclass `Method`, add fields, and define `coefficients`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from ...kernels.common.errors import InputError, SteeringWarning, short_repr
from ...kernels.steering.coefficients import SteeringCoefficients
from ..utils.fields import config_field, invalid_value, validate_types
from .objective import Objective
from .renamed import RenamedAttribute, adopt_old_names

if TYPE_CHECKING:
    from typing_extensions import Self

MAX_STRENGTH = 1000.0
PLACEMENTS = ("system", "user")
RELATIVE_TOP = (
    "allow only tokens at least this likely, relative to the likeliest, in some branch whose coefficient is "
    "above 0; none allows all"
)


@dataclass(frozen=True)
class Method:
    """Base class of all methods: the objectives, and the placement of their texts in the prompt.

    `objective_arity` is "none", "one" or "many": how many objective branches the method decodes. A method for
    one objective joins the texts of several with a space in one branch. `name` is the method's name on the
    command line. `presets` are named settings other than the published ones, see `preset`.
    `normalises_weights`: whether only the ratios of the weights count, as in the published methods.
    """

    objective_arity: ClassVar[str] = "many"
    name: ClassVar[str] = "method"
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    normalises_weights: ClassVar[bool] = True

    objectives: tuple[Objective, ...] = ()
    placement: str = config_field(
        "system", "add objectives to the system text or to the last user turn", PLACEMENTS, kw_only=True
    )

    relative_top: float | None = config_field(None, RELATIVE_TOP, kw_only=True)

    wishes = RenamedAttribute()
    program = RenamedAttribute()
    branches = RenamedAttribute()

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        adopt_old_names(cls)
        cls.name = "".join(f"-{c.lower()}" if c.isupper() else c for c in cls.__name__).lstrip("-")

    def __post_init__(self) -> None:
        validate_types(self, f" of {self.name}")
        _check_objectives(self.objectives)
        if self.objective_arity == "none" and self.objectives:
            raise InputError(
                f"{self.name} takes no objectives, but was given {short_repr(self.objectives[0].text)}"
            )
        if self.objective_arity != "none" and not self.objectives:
            raise InputError(f"{self.name} needs at least one objective and was given none")
        _ = self.cached_coefficients  # a setting out of range is refused now and not at the first token
        for message in self.iter_warnings():
            warnings.warn(message, SteeringWarning, stacklevel=3)

    @classmethod
    def preset(cls, preset: str, objectives: Sequence[Objective], **settings: Any) -> Self:
        """Make the method with the settings of a preset; `settings` override them.

        Raises InputError when the method has no preset of that name.
        """
        return cls(tuple(objectives), **{**cls.preset_settings(preset), **settings})

    @classmethod
    def preset_settings(cls, preset: str) -> Mapping[str, Any]:
        """The settings of a preset. Raises InputError when the method has none of that name."""
        if preset not in cls.presets:
            hint = f"presets are {', '.join(cls.presets)}" if cls.presets else "it has none"
            raise InputError(f"{cls.name} has no preset {short_repr(preset)}; {hint}", "preset")
        return cls.presets[preset]

    def branch_objectives(self) -> tuple[str, ...]:
        """The text of each objective branch, 1..K."""
        if self.objective_arity == "many":
            return tuple(o.text for o in self.objectives)
        return (" ".join(o.text for o in self._weighted_objectives),) if self._weighted_objectives else ()

    def weights(self) -> tuple[float, ...]:
        """The weight of each objective branch: w⁰ of sum 1, or the intensities where they are not normalised.

        All are 0 if those of the objectives are.
        """
        if self.objective_arity == "one":
            return (1.0,) if self._weighted_objectives else ()
        if not self.normalises_weights or not self._weighted_objectives:
            return tuple(o.weight for o in self.objectives)
        max_weight = max((o.weight for o in self.objectives), default=1.0)
        # divide by the largest first: weights may be 1e-300
        scaled = [o.weight / max_weight for o in self.objectives]
        total = sum(scaled)
        return tuple(weight / total for weight in scaled)

    def coefficients(self) -> SteeringCoefficients:
        """The coefficients of this method. Raises InputError when a hyperparameter is out of range."""
        raise NotImplementedError

    @cached_property
    def cached_coefficients(self) -> SteeringCoefficients:
        """What `coefficients` returns, with the settings that all methods have; computed once.

        Those of plain decoding where all weights are 0.

        Raises InputError when a setting is out of range.
        """
        coefficients = self.coefficients()
        if not isinstance(coefficients, SteeringCoefficients):
            raise invalid_value(
                f"coefficients() of {self.name}", coefficients, "of type SteeringCoefficients"
            )
        if coefficients.max_gain and (coefficients.reward_rate or coefficients.kl_budget < math.inf):
            raise InputError(
                f"coefficients() of {self.name} has max_gain with reward_rate or kl_budget; set one"
            )
        if self.relative_top is not None:
            self.require("relative_top", 0 < self.relative_top <= 1, "above 0 and at most 1, or none")
            coefficients = replace(coefficients, relative_top=self.relative_top)
        if self.objectives and not self._weighted_objectives:
            return SteeringCoefficients()  # nothing is asked for: plain decoding
        return coefficients

    def iter_warnings(self) -> Iterator[str]:
        """Messages about settings that may be a mistake; each is issued as a warning on construction."""
        if self.objective_arity == "one" and len({o.weight for o in self._weighted_objectives}) > 1:
            yield (
                f"{self.name} steers toward one objective, so it joins the "
                f"{len(self._weighted_objectives)} objectives in one and ignores their uneven weights"
            )

    def notes(self) -> list[str]:
        """What to know about the settings: the warnings, and how the method changes the weights."""
        asked, notes = [o.weight for o in self._weighted_objectives], list(self.iter_warnings())
        if (
            self.objective_arity == "many"
            and self.normalises_weights
            and asked
            and abs(sum(asked) - 1) > 1e-6
        ):
            used = ", ".join(f"{weight:.3g}" for weight in self.weights() if weight > 0)
            notes.append(f"{self.name} uses only the ratios of the weights: they become {used}")
        if self.objective_arity == "one" and any(weight != 1 for weight in asked):
            notes.append(f"{self.name} steers in full whatever the weight; trim follows weights")
        return notes

    @property
    def _weighted_objectives(self) -> list[Objective]:
        return [o for o in self.objectives if o.weight > 0]

    def require(self, name: str, ok: bool, expected: str) -> None:
        """Raise InputError for the field `name` unless `ok`."""
        if not ok:
            raise invalid_value(f"{name} of {self.name}", getattr(self, name), expected, name)

    def require_positive(self, *names: str) -> None:
        """Raise InputError for a named field that is not a finite number above 0."""
        for name in names:
            value = getattr(self, name)
            self.require(name, math.isfinite(value) and value > 0, "a finite number above 0")


def _check_objectives(objectives: tuple[Objective, ...]) -> None:
    seen: set[str] = set()
    for objective in objectives:
        if objective.text in seen:
            raise InputError(
                f"objective {short_repr(objective.text)} is given twice; give it once with its total weight"
            )
        seen.add(objective.text)


def contrast_coefficients(
    method: Method, a: float, kl_budget: float | None = None, **extra: Any
) -> SteeringCoefficients:
    """Coefficients base_coef = 1 − a, objective_coef = a, which fit most methods: b + a (m − b), strength a.

    Raises InputError when |a| is too large for float32 scores, or when kl_budget is set with a < 1.
    """
    if not abs(a) <= MAX_STRENGTH:
        values = {k: v for k, v in vars(method).items() if type(v) in (int, float)}
        settings = ", ".join(f"{name}={value!r}" for name, value in values.items())
        raise InputError(
            f"{method.name} with {settings} has strength a = {a:.6g}; it must be at most {MAX_STRENGTH:g}"
        )
    if kl_budget is None:
        return SteeringCoefficients(base_coef=1 - a, objective_coef=a, **extra)
    if not (math.isfinite(kl_budget) and kl_budget > 0):
        raise InputError(
            f"kl_budget of {method.name} is {kl_budget!r}; it must be a finite number above 0, or none"
        )
    if a < 1:
        raise InputError(
            f"kl_budget of {method.name} needs a strength of at least 1, but the strength is {a:.6g}"
        )
    return SteeringCoefficients(base_coef=1 - a, objective_coef=a, kl_budget=kl_budget, **extra)
