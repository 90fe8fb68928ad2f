"""From what is typed to a method: wishes as TEXT=WEIGHT, fields as flags or as field=value."""

from __future__ import annotations

from dataclasses import Field, dataclass, fields
from typing import TYPE_CHECKING, Any

from ..engine.methods import METHODS, Method
from ..engine.objective import Objective
from ..kernels.errors import InputError
from . import flags

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable, Mapping, Sequence

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


def method_class(name: str) -> type[Method]:
    """The method of that name. Raises InputError that lists the names there are."""
    for cls in METHODS:
        if cls.name == name:
            return cls
    raise InputError(f"there is no method {name!r}; methods are {', '.join(cls.name for cls in METHODS)}")


def default_method(wishes: Sequence[Objective]) -> str:
    """What decodes when no method is named: mato toward wishes, base without."""
    return "mato" if wishes else "base"


def method_fields() -> dict[str, list[type[Method]]]:
    """The name of every field of every method, with the methods that have it, in the order of METHODS."""
    found: dict[str, list[type[Method]]] = {}
    for cls in METHODS:
        for name in flags.kinds(cls, UNFLAGGED):
            found.setdefault(name, []).append(cls)
    return found


def add_flags(parser: flags.Parser) -> None:
    """The group of wishes, method and all methods' fields; a field that several methods have is one flag."""
    group = parser.add_argument_group(
        "method",
        "How the wishes steer. In brackets: which methods take a setting, and its published default.",
    )
    add_prefer(group)
    names = ", ".join(cls.name for cls in METHODS)
    group.add_argument("--method", metavar="NAME", help=f"{names} (default: mato with wishes, base without)")
    for name, owners in method_fields().items():
        choices = _field(owners[0], name).metadata.get("choices", ())
        flags.add_flag(group, name, flags.kinds(owners[0])[name], _help(name, owners), choices)


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
    for name in method_fields():
        if name in vars(namespace):
            require_field(cls, name, flags.flag(name))
    return Choice(cls, flags.given(cls, namespace, UNFLAGGED), cls.name)


def require_field(cls: type[Method], name: str, called: str) -> None:
    """Refuses a field that `cls` does not have, and says whose it is. `called` is how it was typed."""
    owners = method_fields().get(name, [])
    if cls in owners:
        return
    if owners:
        raise InputError(f"{called} belongs to {_listed([o.name for o in owners])}, not to {cls.name}")
    raise InputError(
        f"{called} is no setting of {cls.name}; it takes {_listed(list(flags.kinds(cls, UNFLAGGED)))}"
    )


def named(name: str, settings: Iterable[str]) -> Choice:
    """A method by name with settings as `field=value`, as chat and compare take them."""
    cls = method_class(name)
    values: dict[str, Any] = {}
    written = [name]
    for setting in settings:
        field, equals, text = setting.partition("=")
        field = field.strip().lstrip("-").replace("-", "_")
        require_field(cls, field, repr(field))
        if not equals:
            raise InputError(f"{setting!r} sets nothing; say it like {field}=VALUE")
        if field in values:
            raise InputError(f"{field} of {name} is set twice; once is enough")
        values[field] = flags.read(field, flags.kinds(cls)[field], text)
        written.append(f"{field}={text}")
    return Choice(cls, values, ":".join(written))


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


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
