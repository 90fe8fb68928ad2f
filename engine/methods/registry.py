"""Registry of the decoding methods and their settings."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

from ...kernels.common.errors import InputError, short_repr
from .base import Method
from .builtin import METHODS
from .trim import Trim

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .objective import Objective


DEFAULT_METHOD: type[Method] = Trim
"""The method of a request that only has objectives."""


def method_class(name: str) -> type[Method]:
    """The method class of a name. Raises InputError that lists the known names."""
    for cls in METHODS:
        if cls.name == name:
            return cls
    known = ", ".join(cls.name for cls in METHODS)
    raise InputError(f"unknown method {short_repr(name)}; methods are {known}", "method")


def default_method(objectives: Sequence[Objective]) -> str:
    """The default method's name: that of `DEFAULT_METHOD` with objectives, base without."""
    return DEFAULT_METHOD.name if objectives else "base"


def setting_names(cls: type[Method]) -> list[str]:
    """The names of a method's fields, except the objectives."""
    return [field.name for field in fields(cls) if field.name != "objectives"]


def methods_by_setting() -> dict[str, list[type[Method]]]:
    """Map each setting name to the methods that have it, in the order of METHODS."""
    methods: dict[str, list[type[Method]]] = {}
    for cls in METHODS:
        for name in setting_names(cls):
            methods.setdefault(name, []).append(cls)
    return methods


def require_setting(cls: type[Method], name: str, label: str) -> None:
    """Raise InputError for a setting that `cls` lacks, naming its owners. `label`: how it was written."""
    owners = methods_by_setting().get(name, [])
    if cls in owners:
        return
    if owners:
        raise InputError(
            f"{label} belongs to {_join_names([owner.name for owner in owners])}, not to {cls.name}"
        )
    raise InputError(f"{label} is not a setting of {cls.name}; it takes {_join_names(setting_names(cls))}")


def _join_names(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
