"""Command-line flags made from dataclass fields, and the fields made from the flags that were given.

A flag that is not given is absent from the namespace, so the dataclass's own default stands and no
default is written twice. Values are read here and checked by the dataclass itself.
"""

from __future__ import annotations

import argparse
import types
from dataclasses import MISSING, Field, dataclass, fields
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin

from ...engine.utils.fields import refusal, types_of, wanted
from ...kernels.common.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Collection

    from .parser import Parser

SWITCH = {
    "true": True,
    "yes": True,
    "on": True,
    "1": True,
    "false": False,
    "no": False,
    "off": False,
    "0": False,
}
LETTER = {int: "N", float: "X"}


@dataclass(frozen=True)
class Kind:
    """How a field is written: the type of one value, whether "none" is one, and how many it holds."""

    item: type
    optional: bool = False
    several: bool = False
    keyed: bool = False


def kind_of(annotation: Any) -> Kind:
    """The kind of a field by its type: int, float, bool, str, tuple[X, ...], dict[int, float] or a union.

    A flag takes the first type of a union; the others are for Python.
    """
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        item = next(a for a in inner if a is not types.NoneType)
        return Kind(item, optional=types.NoneType in inner)
    if origin is tuple:
        return Kind(inner[0], several=True)
    if origin is dict:
        return Kind(inner[1], keyed=True)
    if annotation in (int, float, bool, str):
        return Kind(annotation)
    raise TypeError(f"no flag can be made for a field of type {annotation!r}")


def kinds(cls: type, skip: Collection[str] = ()) -> dict[str, Kind]:
    """The kind of each field of a dataclass, by name, but for those in `skip`."""
    hints = types_of(cls)
    return {f.name: kind_of(hints[f.name]) for f in fields(cls) if f.name not in skip}


def flag(name: str) -> str:
    """`max_tokens` → `--max-tokens`."""
    return "--" + name.replace("_", "-")


def shown(value: Any) -> str:
    """A default as a person would type it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return "none" if value is None else str(value)


def default_of(field: Field[Any]) -> Any:
    """The default of a dataclass field; a field without one has none."""
    if field.default_factory is not MISSING:
        return field.default_factory()
    return field.default


def add_flag(
    group: argparse._ArgumentGroup, name: str, kind: Kind, help: str, choices: Collection[str] = ()
) -> None:
    """Adds the flag of one field. Values stay text until `given` reads them; only bools are switches."""
    text = help.replace("%", "%%")
    if kind.item is bool:
        group.add_argument(
            flag(name), action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, dest=name, help=text
        )
        return
    letter = LETTER.get(kind.item, name.rpartition("_")[2].upper())
    group.add_argument(
        flag(name),
        action="append" if kind.several or kind.keyed else "store",
        default=argparse.SUPPRESS,
        dest=name,
        metavar="ID=BIAS" if kind.keyed else metavar(choices) or letter,
        help=text,
    )


def metavar(choices: Collection[str]) -> str:
    """`{a,b}`, "" without choices. They are shown here and checked where they are used, for some are open."""
    return "{" + ",".join(choices) + "}" if choices else ""


def add_fields(parser: Parser, title: str, cls: type, skip: Collection[str] = ()) -> argparse._ArgumentGroup:
    """A group of flags, one for each field of the dataclass, but for those in `skip`."""
    group = parser.add_argument_group(title)
    by_name = {f.name: f for f in fields(cls)}
    for name, kind in kinds(cls, skip).items():
        field = by_name[name]
        default = default_of(field)
        is_empty = isinstance(default, tuple | dict) and not default
        help = field.metadata["help"] + ("" if is_empty else f" (default: {shown(default)})")
        add_flag(group, name, kind, help, field.metadata.get("choices", ()))
    return group


def given(cls: type, namespace: argparse.Namespace, skip: Collection[str] = ()) -> dict[str, Any]:
    """The fields of `cls` whose flags were given, as their types. Raises InputError for what is none."""
    found = vars(namespace)
    return {
        name: _collected(name, kind, found[name]) for name, kind in kinds(cls, skip).items() if name in found
    }


def _collected(name: str, kind: Kind, value: Any) -> Any:
    if kind.item is bool:
        return value
    if kind.several:
        return tuple(read(flag(name), kind, text) for text in value)
    if kind.keyed:
        return _keyed(flag(name), [_pair(flag(name), kind, text) for text in value])
    return read(flag(name), kind, value)


def _keyed(name: str, pairs: list[tuple[int, Any]]) -> dict[int, Any]:
    found: dict[int, Any] = {}
    for key, value in pairs:
        if key in found:
            raise InputError(f"{name} has {key} twice; once is enough")
        found[key] = value
    return found


def _pair(name: str, kind: Kind, text: str) -> tuple[int, Any]:
    key, equals, value = text.partition("=")
    if not equals:
        raise refusal(name, text, "ID=BIAS, such as 42=-100")
    return read(name, Kind(int), key), read(name, kind, value)


def read(name: str, kind: Kind, text: str) -> Any:
    """One value from its text. `name` is what the sentence of an InputError calls it."""
    if kind.optional and text.strip().lower() == "none":
        return None
    try:
        return SWITCH[text.strip().lower()] if kind.item is bool else kind.item(text)
    except (ValueError, KeyError):
        right = wanted(kind.item) + (", or none" if kind.optional else "")
        raise refusal(name, text, right) from None
