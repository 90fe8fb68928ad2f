"""Thresholds found on a device keep what sorting keeps, whatever a row looks like."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from trimtab.kernels.distributed.vocab_parallel import MASS_SCALE
from trimtab.kernels.steering.layout import RequestLayout
from trimtab.kernels.steering.state import COLUMN_INDEX
from trimtab.kernels.triton.steering.step import VocabTiling
from trimtab.kernels.triton.steering.top_k_top_p import ThresholdKind, find_thresholds

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VOCAB = 2500

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def make_rows() -> tuple[list[str], Tensor]:
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


def keep_mask_by_sorting(row: Tensor, limit: float, temperature: float, kind: ThresholdKind) -> Tensor:
    """Ties are kept; of masses, what integers count."""
    values = row.sort(descending=True).values
    if kind is ThresholdKind.TOP_K:
        return row >= values[min(int(limit), VOCAB) - 1]
    masses = (((values - values[0]) / temperature).exp() * MASS_SCALE).long().cumsum(0)
    return row >= values[(masses.double() >= limit * masses[-1].double()).nonzero()[0, 0]]


def call_find_thresholds(
    kind: ThresholdKind,
    stacked: Tensor,
    limit: float,
    temperatures: float,
    prior_thresholds: Tensor | None = None,
) -> Tensor:
    tiling, count = VocabTiling.from_vocab_size(VOCAB), len(stacked)
    edges = [*range(0, VOCAB, tiling.block_v), VOCAB]
    tops = torch.stack([stacked[:, low:high].amax(1) for low, high in pairwise(edges)], 1)
    groups = RequestLayout.from_branches([(index, [0]) for index in range(count)], DEVICE)
    limits = torch.zeros(count, 3, dtype=torch.float64, device=DEVICE)
    limits[:, kind] = limit
    limits[-1] = 0
    params = torch.zeros(count, len(COLUMN_INDEX), dtype=torch.float64, device=DEVICE)
    for name in ("temperature", "mask_temperature"):
        params[:, COLUMN_INDEX[name]] = temperatures
    return find_thresholds(
        kind, stacked, tops.contiguous(), groups, limits, params, VOCAB, tiling.block_v, prior_thresholds
    )


@pytest.mark.parametrize("count", [1, 50, 1300, VOCAB - 1])
def test_top_k_keeps_the_largest(count: int) -> None:
    named, stacked = make_rows()
    thresholds = call_find_thresholds(ThresholdKind.TOP_K, stacked, count, 1.0)
    assert thresholds[-1] == -torch.inf
    for name, row, threshold in zip(named, stacked, thresholds, strict=False):
        assert torch.equal(row >= threshold, keep_mask_by_sorting(row, count, 1.0, ThresholdKind.TOP_K)), name


@pytest.mark.parametrize(
    ("kind", "mass", "warmth"),
    [
        (ThresholdKind.TOP_P, 1e-9, 1.0),
        (ThresholdKind.TOP_P, 0.9, 0.05),
        (ThresholdKind.TOP_P, 0.9, 30.0),
        (ThresholdKind.NUCLEUS, 0.3, 1.0),
        (ThresholdKind.NUCLEUS, 1 - 1e-9, 1.0),
    ],
)
def test_top_p_keeps_the_smallest_set_that_reaches_the_mass(
    kind: ThresholdKind, mass: float, warmth: float
) -> None:
    """The exponential is each library's own: where the mass is just reached, a token more or less."""
    named, stacked = make_rows()
    thresholds = call_find_thresholds(kind, stacked, mass, warmth)
    assert thresholds[-1] == -torch.inf
    for name, row, threshold in zip(named, stacked, thresholds, strict=False):
        num_kept, right = (
            int((row >= threshold).sum()),
            int(keep_mask_by_sorting(row, mass, warmth, kind).sum()),
        )
        assert abs(num_kept - right) <= 1 + right // 1000, name


def test_top_p_mass_counts_only_tokens_kept_by_the_prior_thresholds() -> None:
    named, stacked = make_rows()
    outer = call_find_thresholds(ThresholdKind.TOP_K, stacked, 40, 1.0)
    thresholds = call_find_thresholds(ThresholdKind.TOP_P, stacked, 0.5, 1.0, outer)
    for name, row, least, threshold in zip(named, stacked, outer, thresholds, strict=False):
        inner = row.masked_fill(row < least, -torch.inf)
        right = keep_mask_by_sorting(inner, 0.5, 1.0, ThresholdKind.TOP_P)
        assert torch.equal((row >= threshold) & (row >= least), right), name
