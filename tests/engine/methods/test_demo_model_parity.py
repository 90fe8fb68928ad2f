"""Parity of the demo model with transformers: 20 prompts, 64 greedy tokens, float32. Prints results (-s)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from trimtab.engine import Amulet, Base, Engine, Mato, Objective, Request, SamplingParams

from ...helpers.naive_decoders import check_greedy, load_reference

if TYPE_CHECKING:
    from pathlib import Path

    from trimtab.engine import Method

TOKENS = 64
PROMPTS = [
    "What happens if an earthworm is cut in half?",
    "Why is the sky blue?",
    "How do I boil an egg?",
    "Tell me about the city of Lisbon.",
    "What is the difference between a virus and a bacterium?",
    "Write a short poem about rain.",
    "How can I fall asleep faster?",
    "Explain what a black hole is.",
    "What should I cook tonight?",
    "Who invented the telephone?",
    "Is it safe to swim after eating?",
    "Give me three tips for a job interview.",
    "What makes bread rise?",
    "How does a bicycle stay upright?",
    "Describe autumn in one paragraph.",
    "Why do cats purr?",
    "What is 17 times 23, and how do you work it out?",
    "How do I say no to a friend?",
    "What is the capital of Mongolia?",
    "Suggest a name for a small bookshop.",
]
UPLIFTING = Objective("Your answer should be uplifting.", 0.7)
SHORT = Objective("Your answer should be one short sentence.", 0.3)
SIMPLE = Objective("Your answer should use simple words.", 0.15)
FORMAL = Objective("Your answer should be formal.", 0.4)
METHODS: list[Method] = [
    Base(),
    Amulet([UPLIFTING]),
    Mato([UPLIFTING, SHORT]),
    Mato([UPLIFTING, SHORT, SIMPLE, FORMAL]),
]


@pytest.mark.long
@pytest.mark.parametrize("method", METHODS, ids=lambda method: f"{method.name}-{len(method.objectives)}")
def test_the_demo_model_generates_the_naive_decoders_tokens(method: Method, demo_folder: Path) -> None:
    engine = Engine.from_pretrained(str(demo_folder), dtype="float32")
    sampling = SamplingParams(max_tokens=TOKENS)
    outputs = [engine.generate(Request(prompt, method, sampling)) for prompt in PROMPTS]
    model, vocab = load_reference(demo_folder), engine.tokenizer.vocab_size
    results = [check_greedy(output, method, model, vocab, teacher_forced=True) for output in outputs]
    tokens, ties = (
        sum(result.tokens for result in results),
        [tie for result in results for tie in result.ties],
    )
    print(f"{method.name} with {len(method.objectives)}: {tokens} tokens, {len(ties)} ties: {ties}")
    assert all(result.holds for result in results)
    assert len(ties) <= 4, "ties that float32 cannot decide are rare"


@pytest.mark.long
def test_base_generates_what_transformers_generates(demo_folder: Path) -> None:
    engine = Engine.from_pretrained(str(demo_folder), dtype="float32")
    outputs = [engine.generate(Request(p, sampling=SamplingParams(max_tokens=TOKENS))) for p in PROMPTS]
    model = load_reference(demo_folder)
    same = 0
    for output in outputs:
        ids = torch.tensor([output.branches[0].prompt_token_ids])
        generated = model.generate(
            ids, max_new_tokens=TOKENS, do_sample=False, attention_mask=torch.ones_like(ids)
        )
        same += generated[0, ids.shape[1] :].tolist() == output.token_ids
    print(f"base: {same} of {len(PROMPTS)} answers equal")
    assert same == len(PROMPTS)
