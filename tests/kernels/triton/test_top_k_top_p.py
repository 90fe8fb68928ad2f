"""Top-k and top-p thresholds of the Triton kernels against sorting."""

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
    """Rows whose threshold is close to the maximum, far below it, among thousands of values, or among ties.

    The last row has no name; its request has no filter.
    """
    draw = torch.randn(VOCAB, generator=torch.Generator().manual_seed(0))
    few = torch.full((VOCAB,), -torch.inf)
    few[[7, 2000, 2499]] = torch.tensor([3.0, 1e-30, -0.0])
    peaked = 0.5 * draw - 40
    peaked[2242] = 20.0
    rows_by_name = {
        "like logits": 3 * draw,
        "flat": 1e-3 * draw + 5,
        "equal": torch.full((VOCAB,), -1.5),
        "two values": (draw > 1).float(),
        "peaked": peaked,
        "few": few,
        "wide": 1e4 * draw,
        "around zero": 1e-20 * draw,
    }
    return list(rows_by_name), torch.stack([*rows_by_name.values(), rows_by_name["flat"]]).to(DEVICE)


def keep_mask_by_sorting(row: Tensor, limit: float, temperature: float, kind: ThresholdKind) -> Tensor:
    """Keep mask by sorting; ties are kept, and masses are fixed-point integers."""
    values = row.sort(descending=True).values
    if kind is ThresholdKind.TOP_K:
        return row >= values[min(int(limit), VOCAB) - 1]
    masses = (((values - values[0]) / temperature).exp() * MASS_SCALE).long().cumsum(0)
    return row >= values[(masses.double() >= limit * masses[-1].double()).nonzero()[0, 0]]


def call_find_thresholds(
    kind: ThresholdKind,
    rows: Tensor,
    limit: float,
    temperatures: float,
    prior_thresholds: Tensor | None = None,
) -> Tensor:
    tiling, count = VocabTiling.from_vocab_size(VOCAB), len(rows)
    split_edges = [*range(0, VOCAB, tiling.block_v), VOCAB]
    split_max = torch.stack([rows[:, low:high].amax(1) for low, high in pairwise(split_edges)], 1)
    layout = RequestLayout.from_branches([(index, [0]) for index in range(count)], DEVICE)
    limits = torch.zeros(count, 3, dtype=torch.float64, device=DEVICE)
    limits[:, kind] = limit
    limits[-1] = 0
    params = torch.zeros(len(COLUMN_INDEX), count, dtype=torch.float64, device=DEVICE)
    for name in ("temperature", "mask_temperature"):
        params[COLUMN_INDEX[name]] = temperatures
    return find_thresholds(
        kind,
        rows,
        split_max.contiguous(),
        layout,
        limits,
        params,
        VOCAB,
        tiling.block_v,
        prior_thresholds,
    )


@pytest.mark.parametrize("count", [1, 50, 1300, VOCAB - 1])
def test_top_k_keeps_the_largest(count: int) -> None:
    names, rows = make_rows()
    thresholds = call_find_thresholds(ThresholdKind.TOP_K, rows, count, 1.0)
    assert thresholds[-1] == -torch.inf
    for name, row, threshold in zip(names, rows, thresholds, strict=False):
        assert torch.equal(row >= threshold, keep_mask_by_sorting(row, count, 1.0, ThresholdKind.TOP_K)), name


@pytest.mark.parametrize(
    ("kind", "mass", "temperature"),
    [
        (ThresholdKind.TOP_P, 1e-9, 1.0),
        (ThresholdKind.TOP_P, 0.9, 0.05),
        (ThresholdKind.TOP_P, 0.9, 30.0),
        (ThresholdKind.NUCLEUS, 0.3, 1.0),
        (ThresholdKind.NUCLEUS, 1 - 1e-9, 1.0),
    ],
)
def test_top_p_keeps_the_smallest_set_that_reaches_the_mass(
    kind: ThresholdKind, mass: float, temperature: float
) -> None:
    """Implementations of exp differ, so that a token more or less may reach the mass."""
    names, rows = make_rows()
    thresholds = call_find_thresholds(kind, rows, mass, temperature)
    assert thresholds[-1] == -torch.inf
    for name, row, threshold in zip(names, rows, thresholds, strict=False):
        num_kept, expected = (
            int((row >= threshold).sum()),
            int(keep_mask_by_sorting(row, mass, temperature, kind).sum()),
        )
        assert abs(num_kept - expected) <= 1 + expected // 1000, name


def test_top_p_mass_counts_only_tokens_kept_by_the_prior_thresholds() -> None:
    names, rows = make_rows()
    prior = call_find_thresholds(ThresholdKind.TOP_K, rows, 40, 1.0)
    thresholds = call_find_thresholds(ThresholdKind.TOP_P, rows, 0.5, 1.0, prior)
    for name, row, prior_threshold, threshold in zip(names, rows, prior, thresholds, strict=False):
        prior_kept = row.masked_fill(row < prior_threshold, -torch.inf)
        expected = keep_mask_by_sorting(prior_kept, 0.5, 1.0, ThresholdKind.TOP_P)
        assert torch.equal((row >= threshold) & (row >= prior_threshold), expected), name
