"""Dataclass fields with help texts and validation, the single definition of every option."""

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
    """A dataclass field with a default, one line of help, and its allowed values.

    The command line generates its flags from these fields. A mutable default (list, dict) is given as a
    callable that returns one. `field_kwargs` are passed to `dataclasses.field`.
    """
    metadata = {"help": help, "choices": choices}
    if callable(default):
        return field(default_factory=default, metadata=metadata, **field_kwargs)
    return field(default=default, metadata=metadata, **field_kwargs)


def validate_types(instance: Any, name_suffix: str = "") -> None:
    """Check each field of a frozen dataclass against its annotated type and choices, before any other check.

    Values are converted to exactly that type: int to float, list to tuple, NumPy numbers to Python numbers.
    The metadata key "expected" describes the valid values where the type does so poorly. `name_suffix`
    follows the field's name in the message, such as " of mato".

    Raises InputError with the field, its value and the expected value.
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
    """Check rules (field name, whether its value is valid, the expected value) in order.

    Raises InputError for the first broken rule, with the field, its value and the expected value.
    """
    for name, ok, expected in rules:
        if not ok:
            raise invalid_value(name, getattr(instance, name), expected)


def reject_unknown_fields(cls: type, names: Iterable[str]) -> None:
    """Raise InputError for a name that is not a field of the dataclass, suggesting similar fields."""
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
    """Convert `value` to int, float, bool, str, a class, X | Y, tuple[X, ...], Sequence[X] or Mapping[X, Y].

    A sequence becomes a new list and a mapping a new dict; other annotations are not checked.
    Raises InputError, whose message says that `name` must be `expected`.
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
    """The error for an invalid value of `name`, which must be `expected`.

    `field` is the field concerned, by default `name` if that is an identifier.
    """
    field_name = name if name.isidentifier() else ""
    return InputError(f"{name} is {short_repr(value)}; it must be {expected}", field or field_name)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`did you mean x or y?` with the known names similar to `name`; "" if there are none."""
    matches = get_close_matches(name, known)
    return f"did you mean {' or '.join(matches)}?" if matches else ""


def describe_type(annotation: Any, *, plural: bool = False) -> str:
    """The type in words for error messages, in the plural if `plural`."""
    origin, args = get_origin(annotation), get_args(annotation)
    if annotation in TYPE_NAMES:
        return TYPE_NAMES[annotation][plural]
    if origin in (Union, UnionType):
        return ", or ".join(describe_type(arg) for arg in args)
    if origin in (list, tuple, Sequence):
        return f"{'lists' if plural else 'a list'} of {describe_type(args[0], plural=True)}"
    if origin in (dict, Mapping) or (_is_class(annotation) and issubclass(annotation, dict)):
        return "dictionaries" if plural else "a dictionary"
    name = getattr(annotation, "__name__", str(annotation))
    return f"{name}s" if plural else f"of type {name}"


def _pick_union_member(value: Any, members: tuple[Any, ...]) -> Any:
    """The union member that the value is an instance of, else the last member other than None."""
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
    return str.__str__(_require_type(value, isinstance(value, str)))  # for a str enum member, its value


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
"""Converters of scalar types; each raises TypeError, ValueError or OverflowError for an invalid value."""
TYPE_NAMES: dict[Any, tuple[str, str]] = {
    int: ("an integer", "integers"),
    float: ("a number", "numbers"),
    bool: ("true or false", "switches"),
    str: ("a string", "strings"),
    NoneType: ("none", "nones"),
}
