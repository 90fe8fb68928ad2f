"""Command-line flags generated from dataclass fields, and field values parsed from the flags.

A flag that is not given is absent from the namespace, so the dataclass default applies and is defined only
once. Values are parsed here and validated by the dataclass.
"""

from __future__ import annotations

import argparse
import types
from dataclasses import MISSING, Field, dataclass, fields
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin

from ...engine.utils.fields import describe_type, field_types, invalid_value
from ...kernels.common.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Collection

    from .parser import Parser

BOOL_VALUES = {
    "true": True,
    "yes": True,
    "on": True,
    "1": True,
    "false": False,
    "no": False,
    "off": False,
    "0": False,
}
METAVARS = {int: "N", float: "X"}


@dataclass(frozen=True)
class FlagType:
    """How a field is parsed: the type of one value, whether "none" is allowed, list or dict."""

    value_type: type
    optional: bool = False
    is_list: bool = False
    is_dict: bool = False


def infer_flag_type(annotation: Any) -> FlagType:
    """The flag type of an annotation: int, float, bool, str, tuple[X, ...], dict[int, float] or a union.

    A flag takes the first type of a union; the others are for Python callers. Raises TypeError for others.
    """
    origin, type_args = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        value_type = next(a for a in type_args if a is not types.NoneType)
        return FlagType(value_type, optional=types.NoneType in type_args)
    if origin is tuple:
        return FlagType(type_args[0], is_list=True)
    if origin is dict:
        return FlagType(type_args[1], is_dict=True)
    if annotation in (int, float, bool, str):
        return FlagType(annotation)
    raise TypeError(f"cannot make a flag for a field of type {annotation!r}")


def infer_flag_types(cls: type, skip: Collection[str] = ()) -> dict[str, FlagType]:
    """The flag type of each field of a dataclass, by name, except those in `skip`."""
    hints = field_types(cls)
    return {f.name: infer_flag_type(hints[f.name]) for f in fields(cls) if f.name not in skip}


def flag_name(name: str) -> str:
    """`max_tokens` → `--max-tokens`."""
    return "--" + name.replace("_", "-")


def format_default(value: Any) -> str:
    """A default value as it would be typed."""
    if isinstance(value, bool):
        return "on" if value else "off"
    return "none" if value is None else str(value)


def get_default(field: Field[Any]) -> Any:
    """The default of a dataclass field; MISSING if it has none."""
    if field.default_factory is not MISSING:
        return field.default_factory()
    return field.default


def add_flag(
    group: argparse._ArgumentGroup, name: str, flag_type: FlagType, help: str, choices: Collection[str] = ()
) -> None:
    """Add the flag of one field. Values stay text until `fields_from_args`; only bools are switches."""
    text = help.replace("%", "%%")
    if flag_type.value_type is bool:
        group.add_argument(
            flag_name(name),
            action=argparse.BooleanOptionalAction,
            default=argparse.SUPPRESS,
            dest=name,
            help=text,
        )
        return
    placeholder = METAVARS.get(flag_type.value_type, name.rpartition("_")[2].upper())
    group.add_argument(
        flag_name(name),
        action="append" if flag_type.is_list or flag_type.is_dict else "store",
        default=argparse.SUPPRESS,
        dest=name,
        metavar="ID=BIAS" if flag_type.is_dict else format_choices(choices) or placeholder,
        help=text,
    )


def format_choices(choices: Collection[str]) -> str:
    """`{a,b}`, or "" without choices. For the help only: values are checked where they are used."""
    return "{" + ",".join(choices) + "}" if choices else ""


def add_fields(parser: Parser, title: str, cls: type, skip: Collection[str] = ()) -> argparse._ArgumentGroup:
    """Add a group of flags, one for each field of the dataclass except those in `skip`."""
    group = parser.add_argument_group(title)
    fields_by_name = {f.name: f for f in fields(cls)}
    for name, flag_type in infer_flag_types(cls, skip).items():
        field = fields_by_name[name]
        default = get_default(field)
        is_empty = isinstance(default, tuple | dict) and not default
        help = field.metadata["help"] + ("" if is_empty else f" (default: {format_default(default)})")
        add_flag(group, name, flag_type, help, field.metadata.get("choices", ()))
    return group


def fields_from_args(cls: type, namespace: argparse.Namespace, skip: Collection[str] = ()) -> dict[str, Any]:
    """The parsed fields of `cls` whose flags were given. Raises InputError for an invalid value."""
    values = vars(namespace)
    return {
        name: _parse_field(name, flag_type, values[name])
        for name, flag_type in infer_flag_types(cls, skip).items()
        if name in values
    }


def _parse_field(name: str, flag_type: FlagType, value: Any) -> Any:
    if flag_type.value_type is bool:
        return value
    if flag_type.is_list:
        return tuple(parse_value(flag_name(name), flag_type, text) for text in value)
    if flag_type.is_dict:
        return _to_unique_dict(
            flag_name(name), [_parse_pair(flag_name(name), flag_type, text) for text in value]
        )
    return parse_value(flag_name(name), flag_type, value)


def _to_unique_dict(name: str, pairs: list[tuple[int, Any]]) -> dict[int, Any]:
    values: dict[int, Any] = {}
    for key, value in pairs:
        if key in values:
            raise InputError(f"{name} has {key} twice; each id may occur once")
        values[key] = value
    return values


def _parse_pair(name: str, flag_type: FlagType, text: str) -> tuple[int, Any]:
    key, sep, value = text.partition("=")
    if not sep:
        raise invalid_value(name, text, "ID=BIAS, such as 42=-100")
    return parse_value(name, FlagType(int), key), parse_value(name, flag_type, value)


def parse_value(name: str, flag_type: FlagType, text: str) -> Any:
    """Parse one value. `name` is its name in the InputError for an invalid value."""
    if flag_type.optional and text.strip().lower() == "none":
        return None
    try:
        return (
            BOOL_VALUES[text.strip().lower()] if flag_type.value_type is bool else flag_type.value_type(text)
        )
    except (ValueError, KeyError):
        expected = describe_type(flag_type.value_type) + (", or none" if flag_type.optional else "")
        raise invalid_value(name, text, expected) from None
