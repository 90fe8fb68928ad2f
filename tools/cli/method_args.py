"""Parse objectives (TEXT=WEIGHT) and methods (flags, or field=value) from the command line."""

from __future__ import annotations

import re
from dataclasses import Field, dataclass, fields
from typing import TYPE_CHECKING, Any

from ...engine.methods.base import Method
from ...engine.methods.builtin import METHODS
from ...engine.methods.objective import Objective
from ...engine.methods.registry import (
    DEFAULT_METHOD,
    default_method,
    method_class,
    methods_by_setting,
    require_setting,
)
from ...kernels.common.errors import InputError, short_repr
from . import flags

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable, Mapping, Sequence

    from .parser import Parser

FIELDS_WITHOUT_FLAG = ("objectives",)
"""Method fields without a flag of their own: objectives are given with --prefer."""


@dataclass(frozen=True)
class MethodSpec:
    """A method class and the settings given for it; the others keep their published defaults."""

    method: type[Method]
    settings: Mapping[str, Any]
    label: str

    def build(self, objectives: Sequence[Objective]) -> Method:
        """The method with these objectives. Raises InputError if a value is out of range."""
        return self.method(tuple(objectives), **self.settings)

    def build_compatible(self, objectives: Sequence[Objective]) -> Method:
        """Like `build`, but drops the objectives if the method takes none."""
        return self.build(() if self.method.objective_arity == "none" else objectives)


NUMBER_LIKE = re.compile(r"[-+]?[\d.,]*\d[\d.,]*\s*%?")
"""What somebody may have meant as a weight, such as 0,7 or 70%."""
COLON_WEIGHT = re.compile(r"(.*\D):\s*(0?\.\d+|1\.0*|\d+(?:\.\d+)?\s*%)", re.DOTALL)
SECOND_WEIGHT = re.compile(r"=\s*[\d.]*\d\s*%?\s*[,;]")


def parse_objective(text: str) -> Objective:
    """`"Be brief.=0.3"` or `"Be brief.=30%"` → Objective("Be brief.", 0.3).

    Without a number after the last "=", the weight is 1. Raises InputError for what looks like a misspelt
    weight, such as `"Be brief:0.3"`.
    """
    objective, sep, weight_text = (part.strip() for part in text.rpartition("="))
    weight = _parse_weight(weight_text) if sep else None
    if weight is None:
        _reject_misspelt_weight(text.strip(), objective if sep else "", weight_text if sep else "")
        return Objective(text.strip())
    if SECOND_WEIGHT.search(objective):
        raise InputError(
            f"the objective {short_repr(text)} has more than one weight; give each objective its own --prefer"
        )
    return Objective(objective, weight)


def _reject_misspelt_weight(text: str, objective: str, weight_text: str) -> None:
    """Raise InputError where the end of the text looks like a weight."""
    if weight_text and NUMBER_LIKE.fullmatch(weight_text):
        raise InputError(
            f"the weight {short_repr(weight_text)} of the objective {short_repr(objective)} is not a number; "
            f"write it as in {short_repr(objective + '=0.7')}"
        )
    if match := COLON_WEIGHT.fullmatch(text):
        right = f"{match[1].strip()}={match[2].replace(' ', '')}"
        raise InputError(
            f"the objective {short_repr(text)} ends with what looks like a weight; write {short_repr(right)}"
        )


def add_method_flags(parser: Parser) -> None:
    """Add --prefer, --method, --preset and the settings; a setting of several methods is one flag."""
    group = parser.add_argument_group(
        "method",
        "How the objectives steer. In brackets: the methods that have a setting, and its published default.",
    )
    add_prefer(group)
    names = ", ".join(cls.name for cls in METHODS)
    group.add_argument(
        "--method",
        metavar="NAME",
        help=f"{names} (default: {DEFAULT_METHOD.name} with objectives, base without)",
    )
    presets = ", ".join(f"{name} ({cls.name})" for cls in METHODS for name in cls.presets)
    group.add_argument(
        "--preset", metavar="NAME", help=f"named settings; explicit flags override them: {presets}"
    )
    for name, methods in methods_by_setting().items():
        choices = _get_field(methods[0], name).metadata.get("choices", ())
        flags.add_flag(
            group, name, flags.infer_flag_types(methods[0])[name], _setting_help(name, methods), choices
        )


def add_prefer(group: argparse._ArgumentGroup) -> None:
    """Add the flag --prefer."""
    group.add_argument(
        "--prefer",
        action="append",
        default=[],
        metavar="TEXT=WEIGHT",
        help="an objective and its weight, split at the last '='; without a number the weight is 1. 0 leaves "
        "the objective out, 1 is full; published methods use only the ratios (may be repeated)",
    )


def parse_objectives(namespace: argparse.Namespace) -> list[Objective]:
    """The objectives given with --prefer."""
    return [parse_objective(text) for text in namespace.prefer]


def method_from_args(namespace: argparse.Namespace, objectives: Sequence[Objective]) -> MethodSpec:
    """The method of --method and its flags. Raises InputError for a flag of another method."""
    cls = method_class(namespace.method or default_method(objectives))
    for name in methods_by_setting():
        if name in vars(namespace):
            require_setting(cls, name, flags.flag_name(name))
    preset_values = {} if namespace.preset is None else cls.preset_settings(namespace.preset)
    return MethodSpec(
        cls, {**preset_values, **flags.fields_from_args(cls, namespace, FIELDS_WITHOUT_FLAG)}, cls.name
    )


def parse_method(name: str, settings: Iterable[str]) -> MethodSpec:
    """Parse a method name and its settings `field=value`, the format of chat and compare.

    Raises InputError for an unknown method or setting, or an invalid value.
    """
    cls = method_class(name)
    values: dict[str, Any] = {}
    preset_values: Mapping[str, Any] = {}
    label_parts = [name]
    for setting in settings:
        field, sep, text = setting.partition("=")
        field = field.strip().lstrip("-").replace("-", "_")
        if field == "preset":
            preset_values = cls.preset_settings(text)
            label_parts.append(f"preset={text}")
            continue
        require_setting(cls, field, repr(field))
        if not sep:
            raise InputError(f"{setting!r} has no value; it must be {field}=VALUE")
        if field in values:
            raise InputError(f"{field} of {name} is set twice; it may be set once")
        values[field] = flags.parse_value(field, flags.infer_flag_types(cls)[field], text)
        label_parts.append(f"{field}={text}")
    return MethodSpec(cls, {**preset_values, **values}, ":".join(label_parts))


def parse_methods(text: str) -> list[MethodSpec]:
    """Parse `"base,mato:kl_budget=0.2:tau=5"`: methods separated by commas, settings after colons."""
    specs = [spec.strip() for spec in text.split(",")]
    if not all(specs):
        raise InputError(
            f"--methods is {text!r}; it must be methods separated by commas, such as base,mato:tau=5"
        )
    methods = [
        parse_method(name.strip(), settings) for name, *settings in (part.split(":") for part in specs)
    ]
    for index, method in enumerate(methods):
        if method.label in {other.label for other in methods[:index]}:
            raise InputError(f"--methods has {method.label!r} twice; each method may occur once")
    return methods


def _parse_weight(text: str) -> float | None:
    """A number, or a percentage as its share of 1; None for anything else."""
    try:
        return float(text[:-1]) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def _get_field(cls: type[Method], name: str) -> Field[Any]:
    return next(f for f in fields(cls) if f.name == name)


def _setting_help(name: str, methods: Sequence[type[Method]]) -> str:
    """The help texts of a setting, each once, with the methods that use it and their defaults."""
    defaults_by_text: dict[str, dict[str, list[str]]] = {}
    for cls in methods:
        field = _get_field(cls, name)
        defaults = defaults_by_text.setdefault(field.metadata["help"], {})
        defaults.setdefault(flags.format_default(flags.get_default(field)), []).append(cls.name)
    return "; ".join(f"{text} [{_format_defaults(defaults)}]" for text, defaults in defaults_by_text.items())


def _format_defaults(defaults: Mapping[str, Sequence[str]]) -> str:
    num_methods = len(METHODS)
    return "; ".join(
        f"{'all' if len(names) == num_methods else ', '.join(names)}: {default}"
        for default, names in defaults.items()
    )
