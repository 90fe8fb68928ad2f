"""Decoding methods: published defaults, coefficients, refused settings and warnings."""

from __future__ import annotations

import dataclasses
import math
import re
import warnings
from typing import TYPE_CHECKING, Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trimtab.engine import (
    Amulet,
    Base,
    ContextSteering,
    Engine,
    Guidance,
    LinearAlignment,
    Mato,
    Method,
    Mixture,
    Objective,
    Opad,
    Prompt,
    Request,
    SamplingParams,
)
from trimtab.engine.methods.builtin import METHODS
from trimtab.engine.utils.fields import config_field
from trimtab.kernels.common.errors import InputError, SteeringWarning
from trimtab.kernels.program import Program
from trimtab.kernels.steering.closed_form import reward_strength, strength
from trimtab.kernels.steering.coefficients import SteeringCoefficients
from trimtab.kernels.steering.rewards import EMA, MEAN, SUM

if TYPE_CHECKING:
    from collections.abc import Callable

KIND, SHORT = Objective("Be kind."), Objective("Be short.")
INF, NAN = math.inf, math.nan


def coefficients_of(program: SteeringCoefficients) -> tuple[float, float]:
    return program.base_coef, program.objective_coef


def test_defaults_are_the_published_values() -> None:
    assert coefficients_of(Base().coefficients()) == (1, 0)
    assert coefficients_of(Prompt([KIND]).coefficients()) == (0, 1)
    assert coefficients_of(Mixture([KIND]).coefficients()) == (0, 1)
    linear = LinearAlignment([KIND])
    assert (linear.ratio, linear.mask_top_p, linear.mask_temperature) == (2, 0.8, 1)
    assert linear.coefficients() == SteeringCoefficients(base_coef=-2, objective_coef=3, mask_top_p=0.8)
    opad = Opad([KIND])
    assert opad.gain == 1
    assert opad.coefficients() == SteeringCoefficients(base_coef=-1, objective_coef=2, prev_contrast_coef=1)
    amulet = Amulet([KIND])
    assert (amulet.alpha, amulet.lam, amulet.eta, amulet.iterations) == (2, 2, 10, 60)
    assert amulet.coefficients().objective_coef == pytest.approx(5.6487, abs=5e-5)
    mato = Mato([KIND, SHORT])
    assert (mato.alpha, mato.lam, mato.nu, mato.iterations, mato.tau) == (0.5, 1, 10, 80, 1)
    assert (mato.accumulate, mato.optimise_weights, mato.optimise_online) == ("sum", True, True)
    assert mato.coefficients().objective_coef == pytest.approx(1.9347, abs=5e-5)
    assert (mato.coefficients().reward_rate, mato.coefficients().accumulate) == (1, SUM)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_a_trust_region_is_off_by_default(method: type[Method]) -> None:
    method_instance = method() if method is Base else method((KIND,))
    assert method_instance.coefficients().kl_budget == INF


@pytest.mark.parametrize(
    "method",
    [
        Guidance([KIND], guidance_scale=2.5),
        ContextSteering([KIND], strength=3),
        LinearAlignment([KIND]),
        Opad([KIND], gain=0.5),
        Amulet([KIND], alpha=0.3),
        Mato([KIND], nu=4),
    ],
    ids=lambda method: method.name,
)
def test_coefficients_of_base_and_objectives_add_to_one(method: Method) -> None:
    assert sum(coefficients_of(method.coefficients())) == pytest.approx(1, abs=1e-15)


def test_hyperparameters_reach_the_coefficients() -> None:
    mato = Mato([KIND], tau=4, beta=2, accumulate="ema", decay=0.5, optimise_online=False, kl_budget=0.2)
    assert mato.coefficients() == SteeringCoefficients(
        base_coef=0, objective_coef=1, reward_rate=0.5, beta=2, accumulate=EMA, decay=0.5, kl_budget=0.2
    )
    assert Mato([KIND], accumulate="mean").coefficients().accumulate == MEAN
    assert Mato([KIND], optimise_weights=False, tau=4).coefficients().reward_rate == 0
    # reading B: a fixed point of (λ + αβ) / λ
    fixed = Mato([KIND], utility="reward", alpha=1, beta=3, lam=2, iterations=5000)
    assert fixed.coefficients().objective_coef == pytest.approx(1 + 3 / 2, abs=1e-3)
    assert LinearAlignment([KIND], ratio=1, mask_top_p=None, kl_budget=0.5).coefficients().kl_budget == 0.5


def test_hyperparameters_of_the_loop_reach_its_strength() -> None:
    loop: dict[str, Any] = {"alpha": 0.8, "lam": 1.2, "iterations": 3}
    assert Amulet([KIND], eta=5, **loop).coefficients().objective_coef == strength(0.8, 1.2, 5, 3)
    assert Mato([KIND], nu=5, **loop).coefficients().objective_coef == strength(0.8, 1.2, 5, 3)
    fixed = Mato([KIND], utility="reward", beta=2, nu=5, **loop)
    assert fixed.coefficients().objective_coef == reward_strength(2 * 0.8, 1.2, 5, 3)


def test_zero_iterations_are_the_merged_policy() -> None:
    assert Amulet([KIND], iterations=0).coefficients().objective_coef == 1
    assert Mato([KIND], iterations=0, kl_budget=0.1).coefficients().objective_coef == 1


REFUSED: list[tuple[type[Method], dict[str, Any], str]] = [
    (LinearAlignment, {"ratio": -1.0}, "ratio of linear-alignment is -1.0"),
    (LinearAlignment, {"ratio": NAN}, "ratio of linear-alignment is nan"),
    (LinearAlignment, {"ratio": INF, "mask_top_p": None}, "ratio of linear-alignment is inf"),
    (LinearAlignment, {"mask_top_p": 0.0}, "mask_top_p of linear-alignment is 0.0"),
    (LinearAlignment, {"mask_top_p": 1.5}, "mask_top_p of linear-alignment is 1.5"),
    (LinearAlignment, {"mask_top_p": NAN}, "mask_top_p of linear-alignment is nan"),
    (LinearAlignment, {"mask_temperature": 0.0}, "mask_temperature of linear-alignment is 0.0"),
    (LinearAlignment, {"mask_temperature": 1e-300}, "is 1e-300; it must be from 1e-06 to 1e+06"),
    (LinearAlignment, {"kl_budget": 0.25}, "linear-alignment takes no kl_budget (0.25)"),
    (LinearAlignment, {"ratio": 2000.0}, "linear-alignment with ratio=2000.0"),
    (ContextSteering, {"strength": NAN}, "context-steering with strength=nan"),
    (ContextSteering, {"strength": 1001.0}, "strength a = 1001; it must be at most 1000"),
    (ContextSteering, {"strength": -1001.0}, "strength a = -1001"),
    (ContextSteering, {"strength": 0.5, "kl_budget": 0.1}, "kl_budget of context-steering needs a strength"),
    (Guidance, {"guidance_scale": -INF}, "guidance with guidance_scale=-inf"),
    (Guidance, {"guidance_scale": 0.9, "kl_budget": 0.1}, "the strength is 0.9"),
    (Guidance, {"kl_budget": 0.0}, "kl_budget of guidance is 0.0"),
    (Guidance, {"kl_budget": -0.5}, "kl_budget of guidance is -0.5"),
    (Guidance, {"kl_budget": NAN}, "kl_budget of guidance is nan"),
    (Guidance, {"kl_budget": INF}, "kl_budget of guidance is inf"),
    (Opad, {"gain": 0.0}, "gain of opad is 0.0"),
    (Opad, {"gain": NAN}, "gain of opad is nan"),
    (Opad, {"gain": 1000.5}, "opad with gain=1000.5"),
    (Amulet, {"alpha": NAN}, "alpha of amulet is nan"),
    (Amulet, {"alpha": INF}, "alpha of amulet is inf"),
    (Amulet, {"alpha": -0.1}, "alpha of amulet is -0.1"),
    (Amulet, {"lam": 0.0}, "lam of amulet is 0.0"),
    (Amulet, {"eta": -10.0}, "eta of amulet is -10.0"),
    (Amulet, {"eta": INF}, "eta of amulet is inf"),
    (Amulet, {"iterations": -1}, "iterations of amulet is -1"),
    (Amulet, {"iterations": 1.5}, "iterations of amulet is 1.5"),
    (Amulet, {"iterations": 10**9}, "iterations of amulet is 1000000000"),
    (Mato, {"alpha": NAN}, "alpha of mato is nan"),
    (Mato, {"lam": NAN}, "lam of mato is nan"),
    (Mato, {"nu": 0.0}, "nu of mato is 0.0"),
    (Mato, {"iterations": -3}, "iterations of mato is -3"),
    (Mato, {"tau": 0.0}, "tau of mato is 0.0"),
    (Mato, {"tau": -1.0}, "tau of mato is -1.0"),
    (Mato, {"tau": NAN}, "tau of mato is nan"),
    (Mato, {"tau": 1e-310}, "tau of mato is 1e-310"),
    (Mato, {"beta": 0.0}, "beta of mato is 0.0"),
    (Mato, {"beta": INF}, "beta of mato is inf"),
    (Mato, {"accumulate": "max"}, "accumulate of mato is 'max'"),
    (Mato, {"utility": "joy"}, "utility of mato is 'joy'"),
    (Mato, {"decay": 1.0}, "decay of mato is 1.0"),
    (Mato, {"decay": -0.1}, "decay of mato is -0.1"),
    (Mato, {"utility": "reward", "alpha": -1.0}, "alpha of mato is -1.0"),
    (Mato, {"utility": "reward", "lam": 0.0}, "lam of mato is 0.0"),
    (Mato, {"utility": "reward", "iterations": -1}, "iterations of mato is -1"),
    (Mato, {"utility": "reward", "iterations": 2.5}, "iterations of mato is 2.5"),
    (Mato, {"utility": "reward", "iterations": 10**12}, "iterations of mato is 1000000000000"),
    (Prompt, {"placement": "assistant"}, "placement of prompt is 'assistant'"),
]


@pytest.mark.parametrize(
    ("method", "fields", "message"), REFUSED, ids=[f"{m.name}-{f}" for m, f, _ in REFUSED]
)
def test_a_hyperparameter_out_of_range_is_refused_by_name_and_value(
    method: type[Method], fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=re.escape(message)) as refused:
        method((KIND,), **fields)
    assert "\n" not in str(refused.value)


def test_opad_has_no_trust_region() -> None:
    assert "kl_budget" not in {f.name for f in dataclasses.fields(Opad)}


@pytest.mark.parametrize("method", [m for m in METHODS if m is not Base], ids=lambda method: method.name)
def test_a_steering_method_without_objectives_is_refused(method: type[Method]) -> None:
    with pytest.raises(InputError, match=f"{method.name} needs at least one objective"):
        method()


def test_base_refuses_objectives() -> None:
    with pytest.raises(InputError, match=r"base takes no objectives, but was given 'Be kind\.'"):
        Base([KIND])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Objective("  "), "an objective's text is empty"),
        (lambda: Objective("Be kind.", -0.5), "'Be kind.' is -0.5"),
        (lambda: Objective("Be kind.", NAN), "'Be kind.' is nan"),
        (lambda: Objective("Be kind.", INF), "'Be kind.' is inf"),
        (lambda: Mato([KIND, SHORT, Objective("Be kind.", 2)]), "objective 'Be kind.' is given twice"),
        (
            lambda: Mato(["Be kind."]),
            "item 0 of objectives of mato is 'Be kind.'; it must be of type Objective",
        ),
        (lambda: Mato("Be kind."), "objectives of mato is 'Be kind.'; it must be a list of Objectives"),
        (lambda: Mato(KIND), "it must be a list of Objectives"),
    ],
)
def test_empty_or_invalid_objectives_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        make()


@pytest.mark.parametrize(
    "make", [lambda: Amulet([KIND], alpha=3.0, iterations=3), lambda: Mato([KIND], alpha=1.5)]
)
def test_alpha_above_lambda_warns_that_the_strength_is_unbounded(make: Callable[[], Method]) -> None:
    with pytest.warns(SteeringWarning, match="grows without bound") as warned:
        assert make().coefficients().objective_coef > 1
    assert [warning.filename for warning in warned] == [__file__], (
        "one warning, at the line that made the method"
    )


def test_alpha_at_lambda_does_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Amulet([KIND], alpha=1.5, lam=1.5)


def test_a_strength_beyond_float32_is_refused_naming_the_values() -> None:
    with pytest.raises(InputError, match=r"amulet with alpha=20\.0, lam=1\.0, .*it must be at most 1000"):
        Amulet([KIND], alpha=20.0, lam=1.0)


@pytest.mark.parametrize("method", [Prompt, LinearAlignment, Guidance, Opad, Amulet], ids=lambda m: m.name)
def test_single_objective_methods_join_equally_weighted_objectives_without_warning(
    method: type[Method],
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        method_instance = method((KIND, SHORT, Objective("Be rude.", 0)))
        assert method_instance.branch_objectives() == ("Be kind. Be short.",)
        assert method_instance.weights() == (1.0,)


@pytest.mark.parametrize("method", [Prompt, LinearAlignment, Guidance, Opad, Amulet], ids=lambda m: m.name)
def test_single_objective_methods_warn_when_they_join_uneven_weights(method: type[Method]) -> None:
    with pytest.warns(
        SteeringWarning, match=f"{method.name} steers toward one objective.*joins the 2 objectives"
    ) as warned:
        method_instance = method((KIND, Objective("Be short.", 3)))
    assert method_instance.branch_objectives() == ("Be kind. Be short.",)
    assert len(warned) == 1


@settings(deadline=None)
@given(st.lists(st.floats(0, 1.7e308), min_size=1, max_size=6).filter(any))
def test_weights_lie_on_the_simplex_whatever_their_size(raw_weights: list[float]) -> None:
    weights = Mato([Objective(str(i), weight) for i, weight in enumerate(raw_weights)]).weights()
    assert all(weight >= 0 for weight in weights)
    assert sum(weights) == pytest.approx(1, abs=1e-15 * len(raw_weights))
    assert all(w == 0 for w, a in zip(weights, raw_weights, strict=True) if a == 0)
    assert (
        weights.index(max(weights)) == raw_weights.index(max(raw_weights)) or weights.count(max(weights)) > 1
    )


@pytest.mark.parametrize("size", [1e-300, 1.0, 1e300, 5e-324])
def test_weights_of_any_scale_are_normalised(size: float) -> None:
    assert Mixture([Objective("a", size), Objective("b", size)]).weights() == (0.5, 0.5)


def test_weights_keep_their_ratio_at_the_ends_of_the_range() -> None:
    for size in (1e-300, 1e300):
        weights = Mixture([Objective("a", 3 * size), Objective("b", size)]).weights()
        assert weights == pytest.approx((0.75, 0.25), rel=1e-15)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_methods_are_frozen(method: type[Method]) -> None:
    method_instance = method() if method is Base else method((KIND,))
    for name in (f.name for f in dataclasses.fields(method_instance)):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(method_instance, name, None)


def test_names_are_those_of_the_command_line() -> None:
    assert [method.name for method in METHODS] == [
        "trim", "base", "prompt", "linear-alignment", "context-steering", "guidance",
        "opad", "amulet", "mato", "mixture",
    ]  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Halfway(Method):
    """A user-defined method: part of the way to the objectives."""

    compilations: ClassVar[int] = 0
    fraction: float = config_field(0.5, "how far")

    def coefficients(self) -> SteeringCoefficients:
        Halfway.compilations += 1
        self.require("fraction", 0 <= self.fraction <= 1, "from 0 to 1")
        return SteeringCoefficients(base_coef=1 - self.fraction, objective_coef=self.fraction)


def test_a_custom_method_steers_like_its_formula(tiny: Engine) -> None:
    sampling = SamplingParams(max_tokens=12, ignore_eos=True)
    mine, theirs, plain = tiny.generate(
        [
            Request("Why?", Halfway([KIND, SHORT], fraction=0.5), sampling),
            Request("Why?", ContextSteering([KIND, SHORT], strength=0.5), sampling),
            Request("Why?", sampling=sampling),
        ]
    )
    assert mine.token_ids == theirs.token_ids != plain.token_ids
    assert mine.trace == theirs.trace
    assert Halfway.name == "halfway"
    assert Halfway.compilations == 1
    with pytest.raises(InputError, match=r"fraction of halfway is 2.0; it must be from 0 to 1"):
        Halfway([KIND], fraction=2)
    with pytest.raises(InputError, match=r"fraction of halfway is 'half'; it must be a number"):
        Halfway([KIND], fraction="half")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Forgetful(Method):
    """A method whose coefficients() returns None, with a field of an unchecked type."""

    fractions: list[complex] | None = None

    def coefficients(self) -> SteeringCoefficients:  # type: ignore[empty-body]
        pass


def test_a_method_without_coefficients_is_refused() -> None:
    message = r"coefficients\(\) of forgetful is None; it must be of type SteeringCoefficients"
    with pytest.raises(InputError, match=message):
        Forgetful([KIND], fractions=[1j])


@pytest.mark.parametrize("cls", [cls for cls in METHODS if cls.presets])
def test_a_preset_fills_unset_fields_and_the_defaults_stay_as_published(cls: type[Method]) -> None:
    objectives = (KIND, SHORT)
    for name, settings_of_preset in cls.presets.items():
        assert cls.preset(name, objectives) == cls(objectives, **settings_of_preset)
        assert cls.preset(name, objectives, placement="user") == cls(
            objectives, **settings_of_preset, placement="user"
        )
        assert cls.preset(name, objectives) != cls(objectives)
    with pytest.raises(InputError, match="has no preset 'bold'; presets are "):
        cls.preset("bold", objectives)


def test_a_method_written_for_the_previous_release_works_and_warns(tiny: Engine) -> None:
    """Its class defines `wishes` and `program`, which returns the old `Program` with the old field names."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")

        @dataclasses.dataclass(frozen=True)
        class PartWay(Method):
            wishes = "many"

            def program(self) -> SteeringCoefficients:
                return Program(base=0.5, scale=0.5)

        old = PartWay([KIND, SHORT])
    messages = [str(each.message) for each in caught if each.category is FutureWarning]
    for name in ("PartWay.wishes", "PartWay.program", "kernels.program.Program"):
        assert any(name in message for message in messages)
    new = ContextSteering([KIND, SHORT], strength=0.5)
    sampling = SamplingParams(max_tokens=8, ignore_eos=True)
    answers = tiny.generate([Request("Why?", method, sampling) for method in (old, new)])
    assert answers[0].token_ids == answers[1].token_ids
    with pytest.warns(FutureWarning, match="Mato.wishes is called objective_arity"):
        assert Mato.wishes == "many"
    with pytest.warns(FutureWarning, match="branches is called branch_objectives"):
        assert old.branches() == (KIND.text, SHORT.text)
