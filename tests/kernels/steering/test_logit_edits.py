"""Bans, biases and the repetition penalty: single scores that change before a token is chosen."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import RepetitionPenaltyLogitsProcessor
from trimtab.engine.methods.builtin import Base, LinearAlignment
from trimtab.kernels.steering.state import Edits

from ..steering_harness import GREEDY, SAMPLED, Request, decode, nucleus, random_logits, same, wishes

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

exactly = settings(deadline=None, derandomize=True, max_examples=15)


def edits(
    bias: Sequence[tuple[int, int, float]] = (), repetition: Sequence[tuple[int, int, float]] = ()
) -> Edits:
    def columns(entries: Sequence[tuple[int, int, float]]) -> tuple[tuple[Tensor, Tensor], Tensor]:
        at = [torch.tensor([entry[i] for entry in entries], dtype=torch.int64) for i in (0, 1)]
        return (at[0], at[1]), torch.tensor([entry[2] for entry in entries], dtype=torch.float32)

    bias_at, added = columns(bias)
    repetition_at, factors = columns(repetition)
    return Edits(bias_at, added, repetition_at, factors)


def test_a_request_whose_every_token_is_banned_fails_alone() -> None:
    requests = [
        Request(Base(), random_logits(seed, 1, 1, 41), draw)
        for seed, draw in enumerate((GREEDY, SAMPLED, SAMPLED))
    ]
    banned = edits(bias=[(1, token, -math.inf) for token in range(41)])
    before, after = decode(*requests), decode(*requests, edits=banned)
    assert [steps[0].failed for steps in after] == [False, True, False]
    assert after[1][0].token == 0
    assert same([after[0], after[2]], [before[0], before[2]])


def test_a_request_whose_whole_support_mask_is_banned_fails() -> None:
    logits = random_logits(0, 1, 2, 41)
    request = Request(LinearAlignment(wishes(1.0), mask_top_p=0.5), logits)
    inside = nucleus(logits[0, 1].double(), 0.5)
    (some,) = decode(request, edits=edits(bias=[(0, token, -math.inf) for token in sorted(inside)[1:]]))
    (none,) = decode(request, edits=edits(bias=[(0, token, -math.inf) for token in inside]))
    assert not some[0].failed
    assert some[0].token == min(inside)
    assert none[0].failed


@exactly
@given(
    seed=st.integers(0, 2**40),
    seen=st.lists(st.integers(0, 40), min_size=1, max_size=30),
    penalty=st.floats(0.2, 5),
)
def test_the_repetition_penalty_is_that_of_transformers(seed: int, seen: list[int], penalty: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = 3 * torch.randn(2, 41, generator=generator)
    ours = scores.clone()
    edits(repetition=[(1, token, penalty) for token in seen]).apply(ours)
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(torch.tensor([seen]), scores[1:].clone())
    assert torch.equal(ours[0], scores[0])
    assert torch.equal(ours[1:], theirs)


def test_biases_add_up_and_act_before_the_repetition_penalty() -> None:
    scores = torch.tensor([[1.0, -1.0, 2.0], [4.0, 5.0, 6.0]])
    edits(
        bias=[(0, 0, 0.5), (0, 0, 0.5), (0, 1, 3.0), (1, 2, -math.inf)],
        repetition=[(0, 0, 2.0), (0, 1, 2.0), (1, 0, 0.5), (1, 2, 2.0)],
    ).apply(scores)
    assert scores.tolist() == [[1.0, 1.0, 2.0], [8.0, 5.0, -math.inf]]


def test_bans_and_biases_decide_the_token_but_not_its_reported_logprob() -> None:
    logits = torch.tensor([[[1.0, 4.0, 3.0, 0.0]]])
    (seen,) = decode(Request(Base(), logits), edits=edits(bias=[(0, 1, -math.inf), (0, 3, 9.0)]))
    assert seen[0].token == 3
    assert seen[0].logprob == pytest.approx(float(logits[0, 0].log_softmax(-1)[3]), abs=1e-6)
