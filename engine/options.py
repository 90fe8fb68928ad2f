"""Dataclass fields that explain themselves: the one place where an option is named and described."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def option(default: Any, help: str, choices: tuple[str, ...] = ()) -> Any:
    """A dataclass field with a default, one line of help, and the values it may take.

    The command line makes its flags from these fields, so nothing about an option is written twice.
    A mutable default (list, dict) is given as a callable that makes one.
    """
    metadata = {"help": help, "choices": choices}
    if callable(default):
        return field(default_factory=default, metadata=metadata)
    return field(default=default, metadata=metadata)
