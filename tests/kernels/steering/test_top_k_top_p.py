"""Top-k, top-p and min-p keep the same tokens as sorting, including ties."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from trimtab.kernels.distributed.vocab_parallel import TOP_P_WINDOW, UNSHARDED
from trimtab.kernels.steering.top_k_top_p import truncation_threshold

property_settings = settings(deadline=None, derandomize=True, max_examples=150)
NEAR = 1e-5
"""A token may differ from sorting only if the mass above it is this close to p."""
VOCABULARIES = (1, 7, 41, 1000, TOP_P_WINDOW + 1, 4097)


def random_rows(seed: int, rows: int, vocab: int, spread: float, grid: float) -> Tensor:
    """Random scores, rounded to multiples of `grid` > 0 to create ties."""
    scores = spread * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed))
    return (scores / grid).round() * grid if grid else scores


def mass_above(scores: Tensor) -> Tensor:
    """For each token of a row, the total probability of tokens with larger scores, by float64 sorting."""
    order = scores.double().argsort(descending=True)
    ordered = scores[order]
    before = torch.cat((torch.zeros(1).double(), scores.double().softmax(-1)[order].cumsum(-1)[:-1]))
    starts = torch.searchsorted(-ordered, -ordered, right=False)  # first index of each tie
    return torch.empty_like(before).scatter(0, order, before[starts])


def keep_by_sorting(scores: Tensor, top_k: int, top_p: float, min_p: float) -> tuple[Tensor, Tensor]:
    """(kept tokens, tokens within rounding that may be kept or not) of one row."""
    keep = torch.ones_like(scores, dtype=torch.bool)
    if 0 < top_k < len(scores):
        keep &= scores >= scores.sort(descending=True).values[top_k - 1]
    either = torch.zeros_like(keep)
    if top_p < 1:
        above = mass_above(scores.masked_fill(~keep, -torch.inf))
        either = (above - top_p).abs() <= NEAR
        keep &= above < top_p
    if min_p > 0:
        ratio = (scores.double() - scores.double().max()).exp()
        either |= (ratio / min_p - 1).abs() <= 1e-5
        keep &= ratio >= min_p
    return keep, either


scores_of = {
    "seed": st.integers(0, 2**32),
    "vocab": st.sampled_from(VOCABULARIES),
    "spread": st.sampled_from((0.01, 1.0, 3.0, 20.0)),
    "grid": st.sampled_from((0.0, 0.5, 2.0)),
}


@property_settings
@given(
    **scores_of,
    top_k=st.sampled_from((0, 1, 2, 9, 40, 1000, 5000)),
    top_p=st.sampled_from((1e-6, 0.1, 0.5, 0.9, 0.95, 0.999, 0.999999, 1.0)) | st.floats(1e-6, 1),
    min_p=st.sampled_from((0.0, 1e-4, 0.05, 0.5, 1.0)),
)
def test_top_k_top_p_min_p_match_sorting(
    seed: int, vocab: int, spread: float, grid: float, top_k: int, top_p: float, min_p: float
) -> None:
    scores = random_rows(seed, 1, vocab, spread, grid)
    threshold = truncation_threshold(
        scores, torch.tensor([top_k]), torch.tensor([top_p]).double(), torch.tensor([min_p]).double()
    )
    keep, either = keep_by_sorting(scores[0], top_k, top_p, min_p)
    got = scores[0] >= threshold[0]
    assert bool(((got == keep) | either).all())
    assert bool(got[scores[0].argmax()])


@property_settings
@given(**scores_of, top_p=st.floats(1e-6, 0.999999))
def test_a_nucleus_is_the_smallest_set_that_reaches_top_p(
    seed: int, vocab: int, spread: float, grid: float, top_p: float
) -> None:
    scores = random_rows(seed, 1, vocab, spread, grid)
    keep_mask = scores[0] >= UNSHARDED.nucleus_threshold(scores, torch.tensor([top_p]).double())[0]
    chances = scores[0].double().softmax(-1)
    least = scores[0][keep_mask].min()
    assert float(chances[keep_mask].sum()) >= top_p - NEAR
    assert float(chances[scores[0] > least].sum()) < top_p + NEAR


@pytest.mark.parametrize("top_p", [0.5, 0.9, 0.999999])
def test_a_nucleus_larger_than_the_window_is_found_by_a_full_sort(top_p: float) -> None:
    scores = random_rows(seed=0, rows=1, vocab=4 * TOP_P_WINDOW, spread=0.05, grid=0)
    keep_mask = scores[0] >= UNSHARDED.nucleus_threshold(scores, torch.tensor([top_p]).double())[0]
    keep, either = keep_by_sorting(scores[0], 0, top_p, 0)
    assert int(keep_mask.sum()) > TOP_P_WINDOW
    assert bool(((keep_mask == keep) | either).all())
    assert int((keep_mask != keep).sum()) <= int(either.sum())


@pytest.mark.parametrize("top_k", [1, 3, 8])
def test_ties_with_the_last_of_the_top_k_are_kept(top_k: int) -> None:
    scores = torch.tensor([[1.0, 5.0, 5.0, 3.0, 5.0, 1.0, 3.0, 0.0, 3.0]])
    keep_mask = scores >= truncation_threshold(scores, torch.tensor([top_k]), torch.ones(1), torch.zeros(1))
    expected_ids = {1: {1, 2, 4}, 3: {1, 2, 4}, 8: {0, 1, 2, 3, 4, 5, 6, 8}}[top_k]
    assert set(keep_mask[0].nonzero()[:, 0].tolist()) == expected_ids


def test_ties_at_the_end_of_the_nucleus_are_kept() -> None:
    scores = torch.tensor([[0.0, 2.0, 0.0, 0.0, -9.0]])
    top_p = torch.tensor([0.75]).double()  # the first token has 0.71
    assert (scores >= UNSHARDED.nucleus_threshold(scores, top_p)).tolist() == [
        [True, True, True, True, False]
    ]


@pytest.mark.parametrize("top_k", [41, 42, 10**6])
def test_top_k_of_at_least_the_vocabulary_size_is_off(top_k: int) -> None:
    scores = random_rows(0, 1, 41, 3, 0)
    threshold = truncation_threshold(scores, torch.tensor([top_k]), torch.ones(1), torch.zeros(1))
    assert threshold.tolist() == [[-torch.inf]]


def test_nothing_is_truncated_when_every_filter_is_off() -> None:
    scores = random_rows(0, 3, 41, 3, 0)
    off = truncation_threshold(scores, torch.zeros(3, dtype=torch.int64), torch.ones(3), torch.zeros(3))
    assert off.tolist() == [[-torch.inf]] * 3


@pytest.mark.parametrize("vocab", [41, 4097])
def test_a_row_has_the_same_threshold_beside_others_as_alone(vocab: int) -> None:
    scores = torch.cat(
        [random_rows(index, 1, vocab, spread, 0) for index, spread in enumerate((0.02, 1, 3, 9, 2))]
    )
    top_k = torch.tensor([0, 2000, 3, 0, 10])
    top_p = torch.tensor([0.9, 0.99999, 1.0, 0.5, 0.999]).double()
    min_p = torch.tensor([0.0, 0.1, 0.0, 0.01, 0.0]).double()
    together = truncation_threshold(scores, top_k, top_p, min_p)
    columns = (scores, top_k, top_p, min_p)
    alone = [truncation_threshold(*(column[row : row + 1] for column in columns)) for row in range(5)]
    assert torch.equal(together, torch.cat(alone))


def test_a_banned_token_is_never_kept() -> None:
    scores = random_rows(0, 1, 41, 3, 0)
    scores[0, ::2] = -torch.inf
    keep_mask = scores >= truncation_threshold(
        scores, torch.tensor([30]), torch.tensor([0.999999]).double(), torch.tensor([1e-9]).double()
    )
    assert not keep_mask[0, ::2].any()
    assert bool(keep_mask[0, 1::2].any())
