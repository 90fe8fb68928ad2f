"""Thresholds found on a device keep what sorting keeps, whatever a row looks like."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from trimtab.kernels.distributed.vocab_parallel import UNIT
from trimtab.kernels.steering.state import Groups
from trimtab.kernels.triton.steering.step import Tiling
from trimtab.kernels.triton.steering.top_k_top_p import Kind, search

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VOCAB = 2500

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def rows() -> tuple[list[str], Tensor]:
    """Where the threshold lies close to the top, far below it, among thousands of others, or among equals.

    The last has no name: it asks for nothing.
    """
    draw = torch.randn(VOCAB, generator=torch.Generator().manual_seed(0))
    few = torch.full((VOCAB,), -torch.inf)
    few[[7, 2000, 2499]] = torch.tensor([3.0, 1e-30, -0.0])
    peaked = 0.5 * draw - 40
    peaked[2242] = 20.0
    named = {
        "like logits": 3 * draw,
        "flat": 1e-3 * draw + 5,
        "equal": torch.full((VOCAB,), -1.5),
        "two values": (draw > 1).float(),
        "peaked": peaked,
        "few": few,
        "wide": 1e4 * draw,
        "around zero": 1e-20 * draw,
    }
    return list(named), torch.stack([*named.values(), named["flat"]]).to(DEVICE)


def kept_by_sorting(row: Tensor, limit: float, temperature: float, kind: Kind) -> Tensor:
    """Ties are kept; of masses, what integers count."""
    values = row.sort(descending=True).values
    if kind is Kind.TOP_K:
        return row >= values[min(int(limit), VOCAB) - 1]
    masses = (((values - values[0]) / temperature).exp() * UNIT).long().cumsum(0)
    return row >= values[(masses.double() >= limit * masses[-1].double()).nonzero()[0, 0]]


def found(kind: Kind, stacked: Tensor, limit: float, warmth: float, outer: Tensor | None = None) -> Tensor:
    tiling, count = Tiling.of(VOCAB), len(stacked)
    edges = [*range(0, VOCAB, tiling.split), VOCAB]
    tops = torch.stack([stacked[:, low:high].amax(1) for low, high in pairwise(edges)], 1)
    groups = Groups.of([(index, [0]) for index in range(count)], DEVICE)
    limits = torch.zeros(count, 3, dtype=torch.float64, device=DEVICE)
    limits[:, kind] = limit
    limits[-1] = 0
    temperature = torch.full((count,), warmth, dtype=torch.float64, device=DEVICE)
    return search(kind, stacked, tops.contiguous(), groups, limits, temperature, VOCAB, tiling.split, outer)


@pytest.mark.parametrize("count", [1, 50, 1300, VOCAB - 1])
def test_the_largest_are_kept(count: int) -> None:
    named, stacked = rows()
    thresholds = found(Kind.TOP_K, stacked, count, 1.0)
    assert thresholds[-1] == -torch.inf
    for name, row, threshold in zip(named, stacked, thresholds, strict=False):
        assert torch.equal(row >= threshold, kept_by_sorting(row, count, 1.0, Kind.TOP_K)), name


@pytest.mark.parametrize(
    ("kind", "mass", "warmth"),
    [
        (Kind.TOP_P, 1e-9, 1.0),
        (Kind.TOP_P, 0.9, 0.05),
        (Kind.TOP_P, 0.9, 30.0),
        (Kind.NUCLEUS, 0.3, 1.0),
        (Kind.NUCLEUS, 1 - 1e-9, 1.0),
    ],
)
def test_the_mass_of_the_likeliest_is_kept(kind: Kind, mass: float, warmth: float) -> None:
    """The exponential is each library's own: where the mass is just reached, a token more or less."""
    named, stacked = rows()
    thresholds = found(kind, stacked, mass, warmth)
    assert thresholds[-1] == -torch.inf
    for name, row, threshold in zip(named, stacked, thresholds, strict=False):
        kept, right = int((row >= threshold).sum()), int(kept_by_sorting(row, mass, warmth, kind).sum())
        assert abs(kept - right) <= 1 + right // 1000, name


def test_masses_are_counted_among_what_is_at_or_above_other_thresholds() -> None:
    named, stacked = rows()
    outer = found(Kind.TOP_K, stacked, 40, 1.0)
    thresholds = found(Kind.TOP_P, stacked, 0.5, 1.0, outer)
    for name, row, least, threshold in zip(named, stacked, outer, thresholds, strict=False):
        inner = row.masked_fill(row < least, -torch.inf)
        right = kept_by_sorting(inner, 0.5, 1.0, Kind.TOP_P)
        assert torch.equal((row >= threshold) & (row >= least), right), name
