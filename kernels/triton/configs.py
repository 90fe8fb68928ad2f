"""Launch configurations of the Triton kernels: the tunable dataclasses and the defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .dot import MIN_DOT_M

MIN_UNFUSED_SLOTS = 8
"""Branch slots per request with which few requests already exceed `LMHeadConfig.max_rows`."""


def next_power_of_2(n: int) -> int:
    """The smallest power of 2 that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


@dataclass(frozen=True)
class LMHeadTile:
    """Tile of one program: vocabulary entries, hidden dimension per step, warps, pipeline stages."""

    tokens: int
    depth: int
    warps: int
    stages: int


@dataclass(frozen=True)
class LMHeadConfig:
    """tiles: by number of rows. max_rows: steps with more row slots than this run unfused."""

    tiles: Mapping[int, LMHeadTile]
    max_rows: int

    def tile_rows(self, num_slots: int, branch_slots: int) -> int:
        """Rows of the tile for `num_slots` row slots; a tile never splits a request's `branch_slots`."""
        min_rows = max(MIN_DOT_M, next_power_of_2(min(num_slots, max(self.tiles))), branch_slots)
        return min(rows for rows in self.tiles if rows >= min_rows)

    def warmup_shapes(self, max_step_rows: int) -> list[tuple[int, int]]:
        """(num_reqs, max_branches) of the smallest step for each compiled tile variant.

        Only one request of a step has `max_branches`, the others have one. Fused steps have at most
        `max_step_rows` rows. The first step is unfused unless hidden states are mixed before the LM head; the
        last is unfused even then.
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
"""From counted bytes and compiled code, not timed: up to 64 rows the weights are read once and the product is
memory-bound; a second row tile would read them again, through a cache that is hardly fast enough."""


@dataclass(frozen=True)
class AttentionConfig:
    """split: keys per split of a decode token. keys: keys per tile for two-byte dtypes, half as many for
    float32. warps, stages: of a decode program; prompt_warps: of a prompt program.
    """

    split: int = 256
    keys: int = 64
    warps: int = 4
    prompt_warps: int = 8
    stages: int = 2


@dataclass(frozen=True)
class LaunchConfigs:
    """All tunable launch parameters of a device."""

    attention: AttentionConfig
    head: LMHeadConfig


DEFAULT_CONFIGS = LaunchConfigs(AttentionConfig(), DEFAULT_LM_HEAD_CONFIG)
"""For all GPUs, from compiled code and counted bytes; not yet measured on any."""
