"""Padding of a CPU step to a row count at which a row's bits do not depend on the other rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def invariant_rows(num_rows: int) -> int:
    """Round `num_rows` up to a row count at which a row's bits do not depend on the row count.

    A CPU computes a single row differently from several. FBGEMM splits rows into tiles of up to six, and its
    AVX2 kernels sum in a different order in a tile of one or two, which a multiple of three never has. Large
    row counts are at most an eighth apart, since oneDNN caches a compiled kernel per row count.
    """
    step = 3 if torch.backends.cpu.get_cpu_capability() in ("DEFAULT", "AVX2") else 1
    while num_rows > 16 * step:
        step *= 2
    return max(2, -(-num_rows // step) * step)


def pad_rows(rows: Sequence[int], device: torch.device) -> Sequence[int]:
    """On a CPU, repeat the last row up to `invariant_rows`; elsewhere return the rows unchanged."""
    if device.type != "cpu":
        return rows
    return [*rows, *([rows[-1]] * (invariant_rows(len(rows)) - len(rows)))]
