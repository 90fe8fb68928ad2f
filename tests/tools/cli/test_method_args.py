"""Parsing of objectives and methods."""

from __future__ import annotations

import re

import pytest
from trimtab.engine.methods.builtin import METHODS, Amulet, Mato
from trimtab.engine.methods.objective import Objective
from trimtab.kernels.common.errors import InputError
from trimtab.tools.cli import flags, method_args
from trimtab.tools.cli.parser import Parser

OBJECTIVES = [Objective("Be brief.")]


@pytest.mark.parametrize(
    ("text", "spec", "weight"),
    [
        ("Be brief.=0.3", "Be brief.", 0.3),
        ("Be brief.", "Be brief.", 1.0),
        ("a=b=2", "a=b", 2.0),
        ("say x=y", "say x=y", 1.0),
        ("ends with =", "ends with =", 1.0),
        ("-x=1e-3", "-x", 0.001),
        ("x = 2", "x", 2.0),
        (" Be kind. = 70 % ", "Be kind.", 0.7),
        ("Be brief=70%", "Be brief", 0.7),
        ("Say: yes", "Say: yes", 1.0),
        ("Mix them 3:2", "Mix them 3:2", 1.0),
        ("Start at 10:30", "Start at 10:30", 1.0),
    ],
)
def test_an_objective_is_split_at_its_last_equals_sign_if_a_number_follows(
    text: str, spec: str, weight: float
) -> None:
    assert method_args.parse_objective(text) == Objective(spec, weight)


@pytest.mark.parametrize("text", ["x=-1", "x=nan", "x=inf", "=1", "", "  =0.5"])
def test_an_objective_without_text_or_with_an_invalid_weight_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="objective"):
        method_args.parse_objective(text)


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("Be kind:0.7", "write 'Be kind=0.7'"),
        ("Be kind: 70 %", "write 'Be kind=70%'"),
        (
            "Be kind=0,7",
            "the weight '0,7' of the objective 'Be kind' is not a number; write it as in 'Be kind=0.7'",
        ),
        ("Be kind=1.2.3", "the weight '1.2.3'"),
        ("Be kind=.7,Be brief=.3", "more than one weight; give each objective its own --prefer"),
    ],
)
def test_a_misspelt_weight_is_refused_with_the_right_spelling(text: str, right: str) -> None:
    with pytest.raises(InputError, match=re.escape(right)):
        method_args.parse_objective(text)


def test_help_of_a_shared_setting_names_each_method_and_its_published_default() -> None:
    parser = Parser("trimtab test", "A test.")
    method_args.add_method_flags(parser)
    helps = {action.dest: action.help or "" for action in parser._actions}
    assert "[amulet: 2.0]" in helps["alpha"]
    assert "[mato: 0.5]" in helps["alpha"]
    assert "[linear-alignment, context-steering, guidance, amulet, mato: none]" in helps["kl_budget"]
    assert "[all: system]" in helps["placement"]


def test_a_shared_setting_has_one_type_and_one_set_of_choices() -> None:
    for name, owners in method_args.methods_by_setting().items():
        kinds = {flags.infer_flag_types(cls)[name] for cls in owners}
        choices = {method_args._get_field(cls, name).metadata.get("choices", ()) for cls in owners}
        assert (name, len(kinds), len(choices)) == (name, 1, 1)


def test_columns_are_methods_with_settings_after_colons() -> None:
    base, mato, amulet = method_args.parse_methods("base, mato:kl_budget=0.2:tau=5,amulet:kl-budget=none")
    assert (base.label, mato.label) == ("base", "mato:kl_budget=0.2:tau=5")
    assert mato.build(OBJECTIVES) == Mato(tuple(OBJECTIVES), kl_budget=0.2, tau=5.0)
    assert amulet.build(OBJECTIVES) == Amulet(tuple(OBJECTIVES))
    assert base.build_compatible(OBJECTIVES).objectives == ()


def test_a_boolean_setting_may_be_set_by_a_word() -> None:
    assert method_args.parse_method("mato", ["optimise_weights=off"]).settings == {"optimise_weights": False}


def test_explicit_settings_override_a_preset_in_any_order() -> None:
    under = Mato.presets["balanced"]
    for text in ("mato:preset=balanced:tau=3", "mato:tau=3:preset=balanced"):
        assert method_args.parse_methods(text)[0].build(OBJECTIVES) == Mato(
            tuple(OBJECTIVES), **{**under, "tau": 3.0}
        )
    parser = Parser("trimtab test", "A test.")
    method_args.add_method_flags(parser)
    typed = method_args.method_from_args(
        parser.parse_argv(["--method", "mato", "--preset", "balanced", "--tau", "3"]), OBJECTIVES
    )
    assert typed.build(OBJECTIVES) == Mato(tuple(OBJECTIVES), **{**under, "tau": 3.0})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("mato:preset=bold", "mato has no preset 'bold'; presets are balanced"),
        ("amulet:preset=balanced", "amulet has no preset 'balanced'; it has none"),
        ("mto", f"unknown method 'mto'; methods are {', '.join(cls.name for cls in METHODS)}"),
        ("amulet:tau=1", "'tau' belongs to mato, not to amulet"),
        ("base:alpha=1", "'alpha' belongs to amulet and mato, not to base"),
        ("opad:foo=1", "'foo' is not a setting of opad; it takes placement, relative_top and gain"),
        ("mato:tau=1:tau=2", "tau of mato is set twice; it may be set once"),
        ("mato:tau", "'tau' has no value; it must be tau=VALUE"),
        ("mato:tau=x", "tau is 'x'; it must be a number"),
        ("mato:optimise_weights=maybe", "optimise_weights is 'maybe'; it must be true or false"),
        ("mato:objectives=x", None),
        ("base,base", "--methods has 'base' twice; each method may occur once"),
        ("base,", "--methods is 'base,'; it must be methods separated by commas, such as base,mato:tau=5"),
    ],
)
def test_an_invalid_column_is_refused(text: str, message: str | None) -> None:
    with pytest.raises(InputError) as caught:
        method_args.parse_methods(text)
    assert message is None or str(caught.value) == message
