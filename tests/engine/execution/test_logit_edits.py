"""Logit edits: bias and bans, penalties, top-k, and vocabulary rows without a token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import RepetitionPenaltyLogitsProcessor
from trimtab.engine import Amulet, Engine, Mato, Request, SamplingParams

from ...helpers.naive_decoders import load_reference
from ...helpers.sample_requests import KIND, QUESTION, SHORT, greedy_params, prompt_ids, sampled_params

if TYPE_CHECKING:
    from pathlib import Path

    from trimtab.engine.outputs import Output


def test_bias_bans_and_forces_tokens(tiny: Engine) -> None:
    plain = tiny.generate(Request(QUESTION, sampling=greedy_params(12, ignore_eos=True)))
    bans = dict.fromkeys(plain.token_ids, -1e9)
    banned = tiny.generate(Request(QUESTION, sampling=greedy_params(12, ignore_eos=True, logit_bias=bans)))
    assert not set(banned.token_ids) & set(plain.token_ids)
    force = tiny.generate(Request(QUESTION, Amulet([KIND]), sampled_params(1, 12, logit_bias={77: 1e9})))
    assert force.token_ids == [77] * 12


def greedy_reference(tiny: Engine, output: Output, change: Any) -> list[int]:
    """The argmax at each position of an answer after `change(log-probabilities, tokens so far)`."""
    prompt = prompt_ids(output)[0]
    rows = tiny.score(prompt + output.token_ids)[len(prompt) - 1 : -1, : tiny.tokenizer.vocab_size]
    return [
        int(change(row.clone(), output.token_ids[:position]).argmax()) for position, row in enumerate(rows)
    ]


@pytest.mark.parametrize(("presence", "frequency"), [(1.5, 0.0), (0.0, 0.7), (0.8, 0.4), (-1.0, -0.3)])
def test_presence_counts_a_token_once_and_frequency_every_use(
    presence: float, frequency: float, tiny: Engine
) -> None:
    def penalised(row: torch.Tensor, tokens: list[int]) -> torch.Tensor:
        for token in set(tokens):
            row[token] -= presence + frequency * tokens.count(token)
        return row

    plain = tiny.generate(Request(QUESTION, sampling=greedy_params(40, ignore_eos=True)))
    sampling = greedy_params(40, ignore_eos=True, presence_penalty=presence, frequency_penalty=frequency)
    output = tiny.generate(Request(QUESTION, sampling=sampling))
    assert output.token_ids == greedy_reference(tiny, output, penalised)
    assert output.token_ids != plain.token_ids


@pytest.mark.parametrize("penalty", [1.3, 3.0, 0.8])
def test_the_repetition_penalty_is_that_of_transformers(
    penalty: float, tiny: Engine, tiny_folder: Path
) -> None:
    output = tiny.generate(
        Request(QUESTION, sampling=greedy_params(30, ignore_eos=True, repetition_penalty=penalty))
    )
    prompt = prompt_ids(output)[0]
    processor = RepetitionPenaltyLogitsProcessor(penalty)
    with torch.inference_mode():
        logits = load_reference(tiny_folder)(torch.tensor([prompt + output.token_ids])).logits[0]
    for position, token in enumerate(output.token_ids):
        ids = torch.tensor([prompt + output.token_ids[:position]])
        row = logits[None, len(prompt) - 1 + position].clone()
        assert token == int(processor(ids, row)[0, : tiny.tokenizer.vocab_size].argmax())
    plain = tiny.generate(Request(QUESTION, sampling=greedy_params(30, ignore_eos=True)))
    assert output.token_ids != plain.token_ids


def test_sampled_tokens_are_among_the_top_k(tiny: Engine) -> None:
    output = tiny.generate(
        Request(QUESTION, Mato([KIND, SHORT]), sampled_params(11, 40, top_k=3, logprobs=10))
    )
    assert output.logprobs is not None
    tokens = 300  # rows without a token are reported too, but never sampled
    ranks = [
        [token for token in entry.top if token < tokens].index(entry.token_id) for entry in output.logprobs
    ]
    assert set(ranks) == {0, 1, 2}


def test_rows_without_a_token_are_never_chosen(tiny: Engine) -> None:
    request = Request(
        QUESTION, sampling=SamplingParams(max_tokens=300, temperature=50.0, seed=3, ignore_eos=True)
    )
    assert max(tiny.generate(request).token_ids) < tiny.tokenizer.vocab_size == 300
