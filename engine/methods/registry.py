"""The methods by their names, and whose each setting is."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING

from ...kernels.common.errors import InputError, quoted
from .base import Method
from .builtin import METHODS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .objective import Objective


def method_class(name: str) -> type[Method]:
    """The method of that name. Raises InputError that lists the names there are."""
    for cls in METHODS:
        if cls.name == name:
            return cls
    known = ", ".join(cls.name for cls in METHODS)
    raise InputError(f"there is no method {quoted(name)}; methods are {known}", "method")


def default_method(wishes: Sequence[Objective]) -> str:
    """What decodes when no method is named: mato toward wishes, base without."""
    return "mato" if wishes else "base"


def settings(cls: type[Method]) -> list[str]:
    """The names of a method's fields, but for the objectives."""
    return [field.name for field in fields(cls) if field.name != "objectives"]


def owners() -> dict[str, list[type[Method]]]:
    """The name of every setting of every method, with the methods that have it, in the order of METHODS."""
    found: dict[str, list[type[Method]]] = {}
    for cls in METHODS:
        for name in settings(cls):
            found.setdefault(name, []).append(cls)
    return found


def require_setting(cls: type[Method], name: str, called: str) -> None:
    """Refuses a setting that `cls` does not have, and says whose it is. `called` is how it was written."""
    having = owners().get(name, [])
    if cls in having:
        return
    if having:
        raise InputError(f"{called} belongs to {_listed([o.name for o in having])}, not to {cls.name}")
    raise InputError(f"{called} is no setting of {cls.name}; it takes {_listed(settings(cls))}")


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
