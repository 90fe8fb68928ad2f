"""What a search aims at: a format of what strangers give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random


@dataclass(frozen=True)
class FuzzTarget:
    """`run` gets which seed an input was made of, and raises InputError or RunError when it refuses it."""

    seeds: list[bytes]
    damage: Callable[[bytes, Random], bytes]
    run: Callable[[int, bytes], None]
