"""Deprecated attribute names of `Method` from 0.1: they work for one release, with a warning."""

from __future__ import annotations

import warnings
from typing import Any

RENAMED = {"wishes": "objective_arity", "program": "coefficients", "branches": "branch_objectives"}
"""Old to new attribute names of `Method`."""


class RenamedAttribute:
    """A deprecated attribute that reads the renamed one, on the class or on an instance."""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: object, owner: type) -> Any:
        warn_renamed(owner, self._name, 3)
        return getattr(owner if instance is None else instance, RENAMED[self._name])


def warn_renamed(cls: type, name: str, stacklevel: int) -> None:
    """Warn that an attribute of a method class was renamed."""
    warnings.warn(
        f"{cls.__name__}.{name} is called {RENAMED[name]} since trimtab 0.2; the old name ends with 0.3",
        FutureWarning,
        stacklevel=stacklevel + 1,
    )


def adopt_old_names(cls: type) -> None:
    """Copy attributes that a subclass defines under an old name to the new name, with a warning."""
    for name, new_name in RENAMED.items():
        if name in vars(cls) and new_name not in vars(cls):
            warn_renamed(cls, name, 4)
            setattr(cls, new_name, vars(cls)[name])
