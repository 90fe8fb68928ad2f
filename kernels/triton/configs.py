"""How kernels are launched: the dataclasses that are tuned, and the configurations that are shipped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import triton

from .dot import LEAST_ROWS

LEAST_BRANCHES = 8
"""Places of a request's branches, with which a small step is too large for any tile."""


@dataclass(frozen=True)
class Tile:
    """Of one program: tokens of the vocabulary, how much of the width at once, warps, stages of its loop."""

    tokens: int
    depth: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Tuning:
    """tiles: by their rows. most_rows: with more places for rows than this, one product after the other."""

    tiles: Mapping[int, Tile]
    most_rows: int

    def rows(self, places: int, slots: int) -> int:
        """Rows of a tile for so many places: no request is cut in two."""
        wanted = max(LEAST_ROWS, triton.next_power_of_2(min(places, max(self.tiles))), slots)
        return min(rows for rows in self.tiles if rows >= wanted)

    def shapes(self, most: int) -> list[tuple[int, int]]:
        """(requests, branches of the widest) of the smallest steps that a tile of each kind is made for.

        Of steps of at most so many rows, where the others have one branch. The first is one that none is for,
        but for a plain step, for which the last is.
        """
        kinds = [(rows, 1 << power) for rows in self.tiles for power in range(rows.bit_length())]
        found = [
            (1 if rows == LEAST_ROWS else rows // slots // 2 + 1, slots // 2 + 1)
            for rows, slots in kinds
            if self.rows(rows, slots) == rows <= self.most_rows
        ]
        apart = self.most_rows // LEAST_BRANCHES + 1, LEAST_BRANCHES // 2 + 1
        found.append((self.most_rows + 1, 1))
        return [apart, *(shape for shape in found if sum(shape) - 1 <= most)]


TUNING = Tuning({16: Tile(128, 64, 4, 4), 32: Tile(128, 64, 8, 3), 64: Tile(128, 64, 8, 3)}, most_rows=64)


@dataclass(frozen=True)
class Attention:
    """split: keys of one split of a decoding token. keys: of one product, of numbers of two bytes, and half
    as many of four. warps, stages: of a program that decodes; prompt_warps: of one with a prompt's tokens.
    """

    split: int = 256
    keys: int = 64
    warps: int = 4
    prompt_warps: int = 8
    stages: int = 2


@dataclass(frozen=True)
class Launches:
    """All that is tuned."""

    attention: Attention
    head: Tuning


SHIPPED = Launches(Attention(), TUNING)
"""For every known GPU alike, by compiled code and counted bytes: none has been measured yet."""
