"""Fuzz target: a format of untrusted input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random


@dataclass(frozen=True)
class FuzzTarget:
    """seeds: valid inputs. damage: mutates one. run: takes the seed's index and an input; raises
    InputError or RunError to refuse it.
    """

    seeds: list[bytes]
    damage: Callable[[bytes, Random], bytes]
    run: Callable[[int, bytes], None]
