"""From what is typed to a method: wishes as TEXT=WEIGHT, fields as flags or as field=value."""

from __future__ import annotations

from dataclasses import Field, dataclass, fields
from typing import TYPE_CHECKING, Any

from ...engine.methods.base import Method
from ...engine.methods.builtin import METHODS
from ...engine.methods.objective import Objective
from ...engine.methods.registry import default_method, method_class, owners, require_setting
from ...kernels.common.errors import InputError
from . import flags

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable, Mapping, Sequence

    from .parser import Parser

UNFLAGGED = ("objectives",)
"""Fields without a flag of their name: objectives are given by --prefer."""


@dataclass(frozen=True)
class Choice:
    """A method and the fields of it that were set; what is not set keeps the published default."""

    method: type[Method]
    values: Mapping[str, Any]
    label: str

    def build(self, wishes: Sequence[Objective]) -> Method:
        """The method toward these wishes. Raises InputError when a value is out of range."""
        return self.method(tuple(wishes), **self.values)

    def toward(self, wishes: Sequence[Objective]) -> Method:
        """As `build`, but a method that takes no wishes is not given any."""
        return self.build(() if self.method.wishes == "none" else wishes)


def parse_wish(text: str) -> Objective:
    """`"Be brief.=0.3"` → Objective("Be brief.", 0.3); without a number after the last "=", weight 1."""
    wish, equals, tail = text.rpartition("=")
    weight = _number(tail) if equals else None
    return Objective(text) if weight is None else Objective(wish, weight)


def add_flags(parser: Parser) -> None:
    """The group of wishes, method and all methods' fields; a field that several methods have is one flag."""
    group = parser.add_argument_group(
        "method",
        "How the wishes steer. In brackets: which methods take a setting, and its published default.",
    )
    add_prefer(group)
    names = ", ".join(cls.name for cls in METHODS)
    group.add_argument("--method", metavar="NAME", help=f"{names} (default: mato with wishes, base without)")
    presets = ", ".join(f"{name} ({cls.name})" for cls in METHODS for name in cls.presets)
    group.add_argument(
        "--preset", metavar="NAME", help=f"settings by name, under those that are given: {presets}"
    )
    for name, having in owners().items():
        choices = _field(having[0], name).metadata.get("choices", ())
        flags.add_flag(group, name, flags.kinds(having[0])[name], _help(name, having), choices)


def add_prefer(group: argparse._ArgumentGroup) -> None:
    """The --prefer flag."""
    group.add_argument(
        "--prefer",
        action="append",
        default=[],
        metavar="TEXT=WEIGHT",
        help="a wish and its weight, split at the last '='; without a number there the weight is 1 "
        "(may be given several times)",
    )


def wishes(namespace: argparse.Namespace) -> list[Objective]:
    """The wishes that were given by --prefer."""
    return [parse_wish(text) for text in namespace.prefer]


def choice(namespace: argparse.Namespace, wished: Sequence[Objective]) -> Choice:
    """The method of --method and its flags. Raises InputError for a flag that another method has."""
    cls = method_class(namespace.method or default_method(wished))
    for name in owners():
        if name in vars(namespace):
            require_setting(cls, name, flags.flag(name))
    under = {} if namespace.preset is None else cls.preset_settings(namespace.preset)
    return Choice(cls, {**under, **flags.given(cls, namespace, UNFLAGGED)}, cls.name)


def named(name: str, settings: Iterable[str]) -> Choice:
    """A method by name with settings as `field=value`, as chat and compare take them."""
    cls = method_class(name)
    values: dict[str, Any] = {}
    under: Mapping[str, Any] = {}
    written = [name]
    for setting in settings:
        field, equals, text = setting.partition("=")
        field = field.strip().lstrip("-").replace("-", "_")
        if field == "preset":
            under = cls.preset_settings(text)
            written.append(f"preset={text}")
            continue
        require_setting(cls, field, repr(field))
        if not equals:
            raise InputError(f"{setting!r} sets nothing; say it like {field}=VALUE")
        if field in values:
            raise InputError(f"{field} of {name} is set twice; once is enough")
        values[field] = flags.read(field, flags.kinds(cls)[field], text)
        written.append(f"{field}={text}")
    return Choice(cls, {**under, **values}, ":".join(written))


def columns(text: str) -> list[Choice]:
    """The methods of `"base,mato:kl_budget=0.2:tau=5"`: separated by commas, settings after colons."""
    parts = [part.strip() for part in text.split(",")]
    if not all(parts):
        raise InputError(
            f"--methods is {text!r}; it must be methods separated by commas, such as base,mato:tau=5"
        )
    found = [named(name.strip(), settings) for name, *settings in (part.split(":") for part in parts)]
    for index, choice in enumerate(found):
        if choice.label in {other.label for other in found[:index]}:
            raise InputError(f"--methods has {choice.label!r} twice; once is enough")
    return found


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _field(cls: type[Method], name: str) -> Field[Any]:
    return next(f for f in fields(cls) if f.name == name)


def _help(name: str, owners: Sequence[type[Method]]) -> str:
    """Each wording of the field's help, once, with the methods that use it and their defaults."""
    wordings: dict[str, dict[str, list[str]]] = {}
    for cls in owners:
        field = _field(cls, name)
        defaults = wordings.setdefault(field.metadata["help"], {})
        defaults.setdefault(flags.shown(flags.default_of(field)), []).append(cls.name)
    return "; ".join(f"{wording} [{_defaults(defaults)}]" for wording, defaults in wordings.items())


def _defaults(defaults: Mapping[str, Sequence[str]]) -> str:
    everyone = len(METHODS)
    return "; ".join(
        f"{'all' if len(names) == everyone else ', '.join(names)}: {default}"
        for default, names in defaults.items()
    )
