"""Bans, biases and the repetition penalty: edits of scores before sampling."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import RepetitionPenaltyLogitsProcessor
from trimtab.engine.methods.builtin import Base, LinearAlignment
from trimtab.kernels.steering.layout import LogitEdits

from ..steering_harness import (
    GREEDY,
    SAMPLED,
    SteeringCase,
    bitwise_equal,
    decode,
    make_objectives,
    nucleus_by_sorting,
    random_logits,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

property_settings = settings(deadline=None, derandomize=True, max_examples=15)


def make_edits(
    bias: Sequence[tuple[int, int, float]] = (), repetition: Sequence[tuple[int, int, float]] = ()
) -> LogitEdits:
    def columns(entries: Sequence[tuple[int, int, float]]) -> tuple[tuple[Tensor, Tensor], Tensor]:
        at = [torch.tensor([entry[i] for entry in entries], dtype=torch.int64) for i in (0, 1)]
        return (at[0], at[1]), torch.tensor([entry[2] for entry in entries], dtype=torch.float32)

    bias_at, added = columns(bias)
    repetition_at, factors = columns(repetition)
    return LogitEdits(bias_at, added, repetition_at, factors)


def test_a_request_whose_every_token_is_banned_fails_alone() -> None:
    requests = [
        SteeringCase(Base(), random_logits(seed, 1, 1, 41), draw)
        for seed, draw in enumerate((GREEDY, SAMPLED, SAMPLED))
    ]
    banned = make_edits(bias=[(1, token, -math.inf) for token in range(41)])
    before, after = decode(*requests), decode(*requests, edits=banned)
    assert [steps[0].failed for steps in after] == [False, True, False]
    assert after[1][0].token == 0
    assert bitwise_equal([after[0], after[2]], [before[0], before[2]])


def test_a_request_whose_support_mask_is_fully_banned_fails() -> None:
    logits = random_logits(0, 1, 2, 41)
    request = SteeringCase(LinearAlignment(make_objectives(1.0), mask_top_p=0.5), logits)
    inside = nucleus_by_sorting(logits[0, 1].double(), 0.5)
    (steps,) = decode(request, edits=make_edits(bias=[(0, token, -math.inf) for token in sorted(inside)[1:]]))
    (none,) = decode(request, edits=make_edits(bias=[(0, token, -math.inf) for token in inside]))
    assert not steps[0].failed
    assert steps[0].token == min(inside)
    assert none[0].failed


@property_settings
@given(
    seed=st.integers(0, 2**40),
    seen_ids=st.lists(st.integers(0, 40), min_size=1, max_size=30),
    penalty=st.floats(0.2, 5),
)
def test_the_repetition_penalty_matches_transformers(seed: int, seen_ids: list[int], penalty: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = 3 * torch.randn(2, 41, generator=generator)
    ours = scores.clone()
    make_edits(repetition=[(1, token, penalty) for token in seen_ids]).apply(ours)
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([seen_ids]), scores[1:].clone())
    assert torch.equal(ours[0], scores[0])
    assert torch.equal(ours[1:], theirs)


def test_biases_add_up_and_act_before_the_repetition_penalty() -> None:
    scores = torch.tensor([[1.0, -1.0, 2.0], [4.0, 5.0, 6.0]])
    make_edits(
        bias=[(0, 0, 0.5), (0, 0, 0.5), (0, 1, 3.0), (1, 2, -math.inf)],
        repetition=[(0, 0, 2.0), (0, 1, 2.0), (1, 0, 0.5), (1, 2, 2.0)],
    ).apply(scores)
    assert scores.tolist() == [[1.0, 1.0, 2.0], [8.0, 5.0, -math.inf]]


def test_bans_and_biases_change_the_token_but_not_the_reported_logprobs() -> None:
    logits = torch.tensor([[[1.0, 4.0, 3.0, 0.0]]])
    (steps,) = decode(SteeringCase(Base(), logits), edits=make_edits(bias=[(0, 1, -math.inf), (0, 3, 9.0)]))
    assert steps[0].token == 3
    assert steps[0].logprob == pytest.approx(float(logits[0, 0].log_softmax(-1)[3]), abs=1e-6)
