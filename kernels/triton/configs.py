"""How kernels are launched: the dataclasses that are tuned, and the configurations that are shipped."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import triton

from .dot import MIN_DOT_M

MIN_UNFUSED_SLOTS = 8
"""Places of a request's branches, with which a small step is too large for any tile."""


@dataclass(frozen=True)
class LMHeadTile:
    """Of one program: tokens of the vocabulary, how much of the width at once, warps, stages of its loop."""

    tokens: int
    depth: int
    warps: int
    stages: int


@dataclass(frozen=True)
class LMHeadConfig:
    """tiles: by their rows. max_rows: with more places for rows than this, one product after the other."""

    tiles: Mapping[int, LMHeadTile]
    max_rows: int

    def tile_rows(self, num_slots: int, branch_slots: int) -> int:
        """Rows of a tile for so many places: no request is cut in two."""
        min_rows = max(MIN_DOT_M, triton.next_power_of_2(min(num_slots, max(self.tiles))), branch_slots)
        return min(rows for rows in self.tiles if rows >= min_rows)

    def warmup_shapes(self, max_step_rows: int) -> list[tuple[int, int]]:
        """(requests, branches of the widest) of the smallest steps that a tile of each kind is made for.

        Of steps of at most so many rows, where the others have one branch. The first is one that none is for,
        but for a plain step, for which the last is.
        """
        tile_kinds = [(rows, 1 << power) for rows in self.tiles for power in range(rows.bit_length())]
        shapes = [
            (1 if rows == MIN_DOT_M else rows // slots // 2 + 1, slots // 2 + 1)
            for rows, slots in tile_kinds
            if self.tile_rows(rows, slots) == rows <= self.max_rows
        ]
        unfused = self.max_rows // MIN_UNFUSED_SLOTS + 1, MIN_UNFUSED_SLOTS // 2 + 1
        shapes.append((self.max_rows + 1, 1))
        return [unfused, *(shape for shape in shapes if sum(shape) - 1 <= max_step_rows)]


DEFAULT_LM_HEAD_CONFIG = LMHeadConfig(
    {16: LMHeadTile(128, 64, 4, 4), 32: LMHeadTile(128, 64, 8, 3), 64: LMHeadTile(128, 64, 8, 3)}, max_rows=64
)


@dataclass(frozen=True)
class AttentionConfig:
    """split: keys of one split of a decoding token. keys: of one product, of numbers of two bytes, and half
    as many of four. warps, stages: of a program that decodes; prompt_warps: of one with a prompt's tokens.
    """

    split: int = 256
    keys: int = 64
    warps: int = 4
    prompt_warps: int = 8
    stages: int = 2


@dataclass(frozen=True)
class LaunchConfigs:
    """All that is tuned."""

    attention: AttentionConfig
    head: LMHeadConfig


DEFAULT_CONFIGS = LaunchConfigs(AttentionConfig(), DEFAULT_LM_HEAD_CONFIG)
"""For every known GPU alike, by compiled code and counted bytes: none has been measured yet."""
