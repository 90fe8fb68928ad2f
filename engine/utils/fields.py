"""Dataclass fields with their help and checks: options are named, described and checked in one place."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import field, fields
from difflib import get_close_matches
from functools import cache
from numbers import Real
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from ...kernels.common.errors import InputError, short_repr


def config_field(default: Any, help: str, choices: tuple[str, ...] = (), **field_kwargs: Any) -> Any:
    """A dataclass field with a default, one line of help, and the values it may take; `field_kwargs` is for
    `field`.

    The command line makes its flags from these fields, so nothing about an option is written twice.
    A mutable default (list, dict) is given as a callable that makes one.
    """
    metadata = {"help": help, "choices": choices}
    if callable(default):
        return field(default_factory=default, metadata=metadata, **field_kwargs)
    return field(default=default, metadata=metadata, **field_kwargs)


def validate_types(instance: Any, name_suffix: str = "") -> None:
    """Holds each field of a frozen dataclass to its annotated type and its choices, before any other check.

    What fits is kept as exactly that type: an int becomes a float, a list a tuple, numpy's numbers Python's.
    Metadata "wanted" says in words what a field takes, where its type says it badly. `name_suffix` follows a
    field's name in the sentence, such as " of mato".

    Raises InputError that names the field, its value and what would be right.
    """
    cls: type = type(instance)
    hints = field_types(cls)
    for item in fields(instance):
        choices = item.metadata.get("choices", ())
        expected = f"one of {', '.join(choices)}" if choices else item.metadata.get("expected", "")
        name = item.name + name_suffix
        try:
            value = coerce(name, getattr(instance, item.name), hints[item.name], expected)
        except InputError as error:
            error.field = item.name
            raise
        if choices and value not in choices:
            raise invalid_value(name, value, expected)
        object.__setattr__(instance, item.name, value)


def validate_rules(instance: Any, *rules: tuple[str, bool, str]) -> None:
    """Refuses the first field that breaks its rule: (its name, whether its value fits, what would be right).

    Raises InputError that names the field, its value and what would be right.
    """
    for name, ok, expected in rules:
        if not ok:
            raise invalid_value(name, getattr(instance, name), expected)


def reject_unknown_fields(cls: type, names: Iterable[str]) -> None:
    """Raises InputError for a name that is no field of the dataclass, with the fields that look like it."""
    field_names = [item.name for item in fields(cls)]
    for name in names:
        if name not in field_names:
            hint = did_you_mean(name, field_names) or f"its fields are {', '.join(field_names)}"
            raise InputError(f"{cls.__name__} has no field {name!r}; {hint}")


@cache
def field_types(cls: type) -> dict[str, Any]:
    """The annotated type of each field of a dataclass."""
    return get_type_hints(cls)


def coerce(name: str, value: Any, annotation: Any, expected: str = "") -> Any:
    """`value` as its type: int, float, bool, str, a class, X | Y, tuple[X, ...], Sequence[X], Mapping[X, Y].

    A sequence becomes a list and a mapping a dict, new ones; an annotation of another kind is not checked.
    Raises InputError, in which `name` is what holds the value and `expected` what it must be.
    """
    expected = expected or describe_type(annotation)
    origin, args = get_origin(annotation), get_args(annotation)
    if annotation in SCALAR_CONVERTERS:
        try:
            return SCALAR_CONVERTERS[annotation](value)
        except OverflowError:
            expected = "a number that fits 64 bits"
        except (TypeError, ValueError):
            pass
    elif origin in (Union, UnionType):
        return coerce(name, value, _pick_union_member(value, args), expected)
    elif origin in (tuple, Sequence):
        if isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping):
            items = [coerce(f"item {index} of {name}", item, args[0]) for index, item in enumerate(value)]
            return tuple(items) if origin is tuple else items
    elif origin in (dict, Mapping):
        if isinstance(value, Mapping):
            keys = [coerce(f"a key of {name}", key, args[0]) for key in value]
            items = [coerce(f"item {key!r} of {name}", value[key], args[1]) for key in value]
            return dict(zip(keys, items, strict=True))
    elif not _is_class(annotation) or isinstance(value, annotation):
        return value
    raise invalid_value(name, value, expected)


def invalid_value(name: str, value: Any, expected: str, field: str = "") -> InputError:
    """The error for a value that `name` must not have. `expected` says what would be; `field` is the field
    that it is about, where that is not the name itself."""
    field_name = name if name.isidentifier() else ""
    return InputError(f"{name} is {short_repr(value)}; it must be {expected}", field or field_name)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`did you mean x or y?` for a name that looks like these; "" where none does."""
    matches = get_close_matches(name, known)
    return f"did you mean {' or '.join(matches)}?" if matches else ""


def describe_type(annotation: Any, *, plural: bool = False) -> str:
    """What a value of this type is called in a sentence; `plural` for the plural."""
    origin, args = get_origin(annotation), get_args(annotation)
    if annotation in TYPE_NAMES:
        return TYPE_NAMES[annotation][plural]
    if origin in (Union, UnionType):
        return ", or ".join(describe_type(arg) for arg in args)
    if origin in (tuple, Sequence):
        return f"{'lists' if plural else 'a list'} of {describe_type(args[0], plural=True)}"
    if origin in (dict, Mapping):
        return "dictionaries" if plural else "a dictionary"
    name = getattr(annotation, "__name__", str(annotation))
    return f"{name}s" if plural else f"of type {name}"


def _pick_union_member(value: Any, members: tuple[Any, ...]) -> Any:
    """Which type of a union to hold the value to: the one that it looks like, else the last but None."""
    default = [member for member in members if member is not NoneType][-1]
    classes = {kind: get_origin(kind) or kind for kind in members}
    return next(
        (member_type for member_type, cls in classes.items() if _is_class(cls) and isinstance(value, cls)),
        default,
    )


def _is_class(annotation: Any) -> bool:
    return isinstance(annotation, type) and get_origin(annotation) is None and annotation is not Any


def _to_int(value: Any) -> int:
    number = operator.index(_require_type(value, not isinstance(value, bool)))
    if not -(2**63) <= number < 2**64:
        raise OverflowError
    return number


def _to_float(value: Any) -> float:
    return float(_require_type(value, isinstance(value, Real) and not isinstance(value, bool)))


def _to_bool(value: Any) -> bool:
    return bool(_require_type(value, isinstance(value, bool)))


def _to_str(value: Any) -> str:
    return str.__str__(_require_type(value, isinstance(value, str)))  # of an enum's member the text itself


def _require_type(value: Any, ok: bool) -> Any:
    if not ok:
        raise TypeError
    return value


SCALAR_CONVERTERS: dict[Any, Callable[[Any], Any]] = {
    int: _to_int,
    float: _to_float,
    bool: _to_bool,
    str: _to_str,
}
"""The types of single values; each function raises an error for what is none."""
TYPE_NAMES: dict[Any, tuple[str, str]] = {
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    bool: ("true or false", "switches"),
    str: ("a text", "texts"),
    NoneType: ("none", "nones"),
}
