"""Dataclass fields that explain themselves: the one place where an option is named, described and checked."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import field, fields
from difflib import get_close_matches
from functools import cache
from numbers import Real
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from ...kernels.common.errors import InputError, quoted


def option(default: Any, help: str, choices: tuple[str, ...] = (), **more: Any) -> Any:
    """A dataclass field with a default, one line of help, and the values it may take; `more` is for `field`.

    The command line makes its flags from these fields, so nothing about an option is written twice.
    A mutable default (list, dict) is given as a callable that makes one.
    """
    metadata = {"help": help, "choices": choices}
    if callable(default):
        return field(default_factory=default, metadata=metadata, **more)
    return field(default=default, metadata=metadata, **more)


def check_fields(made: Any, owner: str = "") -> None:
    """Holds each field of a frozen dataclass to its annotated type and its choices, before any other check.

    What fits is kept as exactly that type: an int becomes a float, a list a tuple, numpy's numbers Python's.
    Metadata "wanted" says in words what a field takes, where its type says it badly. `owner` follows a
    field's name in the sentence, such as " of mato".

    Raises InputError that names the field, its value and what would be right.
    """
    cls: type = type(made)
    hints = types_of(cls)
    for each in fields(made):
        choices = each.metadata.get("choices", ())
        right = f"one of {', '.join(choices)}" if choices else each.metadata.get("wanted", "")
        name = each.name + owner
        try:
            value = fitted(name, getattr(made, each.name), hints[each.name], right)
        except InputError as error:
            error.field = each.name
            raise
        if choices and value not in choices:
            raise refusal(name, value, right)
        object.__setattr__(made, each.name, value)


def require_fields(made: Any, *rules: tuple[str, bool, str]) -> None:
    """Refuses the first field that breaks its rule: (its name, whether its value fits, what would be right).

    Raises InputError that names the field, its value and what would be right.
    """
    for name, ok, right in rules:
        if not ok:
            raise refusal(name, getattr(made, name), right)


def check_known(cls: type, names: Iterable[str]) -> None:
    """Raises InputError for a name that is no field of the dataclass, with the fields that look like it."""
    known = [each.name for each in fields(cls)]
    for name in names:
        if name not in known:
            help = meant(name, known) or f"its fields are {', '.join(known)}"
            raise InputError(f"{cls.__name__} has no field {name!r}; {help}")


@cache
def types_of(cls: type) -> dict[str, Any]:
    """The annotated type of each field of a dataclass."""
    return get_type_hints(cls)


def fitted(name: str, value: Any, annotation: Any, right: str = "") -> Any:
    """`value` as its type: int, float, bool, str, a class, X | Y, tuple[X, ...], Sequence[X], Mapping[X, Y].

    A sequence becomes a list and a mapping a dict, new ones; an annotation of another kind is not checked.
    Raises InputError, in which `name` is what holds the value and `right` what it must be.
    """
    right = right or wanted(annotation)
    origin, inner = get_origin(annotation), get_args(annotation)
    if annotation in SCALARS:
        try:
            return SCALARS[annotation](value)
        except OverflowError:
            right = "a number that fits 64 bits"
        except (TypeError, ValueError):
            pass
    elif origin in (Union, UnionType):
        return fitted(name, value, _likeliest(value, inner), right)
    elif origin in (tuple, Sequence):
        if isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping):
            items = [fitted(f"item {index} of {name}", item, inner[0]) for index, item in enumerate(value)]
            return tuple(items) if origin is tuple else items
    elif origin in (dict, Mapping):
        if isinstance(value, Mapping):
            keys = [fitted(f"a key of {name}", key, inner[0]) for key in value]
            items = [fitted(f"item {key!r} of {name}", value[key], inner[1]) for key in value]
            return dict(zip(keys, items, strict=True))
    elif not _is_class(annotation) or isinstance(value, annotation):
        return value
    raise refusal(name, value, right)


def refusal(name: str, value: Any, right: str, field: str = "") -> InputError:
    """The error for a value that `name` must not have. `right` says what would be; `field` is the field that
    it is about, where that is not the name itself."""
    own = name if name.isidentifier() else ""
    return InputError(f"{name} is {quoted(value)}; it must be {right}", field or own)


def meant(name: str, known: Iterable[str]) -> str:
    """`did you mean x or y?` for a name that looks like these; "" where none does."""
    alike = get_close_matches(name, known)
    return f"did you mean {' or '.join(alike)}?" if alike else ""


def wanted(annotation: Any, *, many: bool = False) -> str:
    """What a value of this type is called in a sentence; `many` for the plural."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if annotation in WORDS:
        return WORDS[annotation][many]
    if origin in (Union, UnionType):
        return ", or ".join(wanted(each) for each in inner)
    if origin in (tuple, Sequence):
        return f"{'lists' if many else 'a list'} of {wanted(inner[0], many=True)}"
    if origin in (dict, Mapping):
        return "dictionaries" if many else "a dictionary"
    name = getattr(annotation, "__name__", str(annotation))
    return f"{name}s" if many else f"of type {name}"


def _likeliest(value: Any, kinds: tuple[Any, ...]) -> Any:
    """Which type of a union to hold the value to: the one that it looks like, else the last but None."""
    last = [kind for kind in kinds if kind is not NoneType][-1]
    classes = {kind: get_origin(kind) or kind for kind in kinds}
    return next((k for k, cls in classes.items() if _is_class(cls) and isinstance(value, cls)), last)


def _is_class(annotation: Any) -> bool:
    return isinstance(annotation, type) and get_origin(annotation) is None and annotation is not Any


def _whole(value: Any) -> int:
    number = operator.index(_require(value, not isinstance(value, bool)))
    if not -(2**63) <= number < 2**64:
        raise OverflowError
    return number


def _real(value: Any) -> float:
    return float(_require(value, isinstance(value, Real) and not isinstance(value, bool)))


def _switch(value: Any) -> bool:
    return bool(_require(value, isinstance(value, bool)))


def _text(value: Any) -> str:
    return str.__str__(_require(value, isinstance(value, str)))  # of an enum's member the text itself


def _require(value: Any, ok: bool) -> Any:
    if not ok:
        raise TypeError
    return value


SCALARS: dict[Any, Callable[[Any], Any]] = {int: _whole, float: _real, bool: _switch, str: _text}
"""The types of single values; each function raises an error for what is none."""
WORDS: dict[Any, tuple[str, str]] = {
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    bool: ("true or false", "switches"),
    str: ("a text", "texts"),
    NoneType: ("none", "nones"),
}
