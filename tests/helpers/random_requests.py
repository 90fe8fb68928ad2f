"""Random requests: all methods, short and long answers, prompts with shared prefixes."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from trimtab.engine import (
    Amulet,
    Base,
    ContextSteering,
    Guidance,
    LinearAlignment,
    Mato,
    Mixture,
    Objective,
    Opad,
    Prompt,
    Request,
    SamplingParams,
)

if TYPE_CHECKING:
    from trimtab.engine import Method

WORDS = ("kind", "true", "short", "odd", "calm", "wise", "dry", "loud")
OBJECTIVES = [Objective(f"Be {word}.", 1 + at) for at, word in enumerate(WORDS)]
SYSTEM = "You are a helpful assistant. Your answer should be short, kind and true. " * 2


def all_methods() -> list[Method]:
    """Every method, with 0 to 8 objectives."""
    return [
        *(Mato(OBJECTIVES[:count]) for count in (1, 2, 3, 5, 8)),
        Base(),
        Prompt(OBJECTIVES[:1]),
        LinearAlignment(OBJECTIVES[:1]),
        ContextSteering(OBJECTIVES[:4]),
        Guidance(OBJECTIVES[1:2], kl_budget=0.3),
        Opad(OBJECTIVES[2:3]),
        Amulet(OBJECTIVES[:1]),
        Amulet(OBJECTIVES[3:4], kl_budget=0.05),
        Mixture(OBJECTIVES[:3]),
        Mato(OBJECTIVES[2:6], accumulate="ema", kl_budget=0.2),
        Mato(OBJECTIVES[4:6], accumulate="mean", placement="user"),
    ]


PROMPTS: list[Any] = [
    "Why?",
    "What happens if an earthworm is cut in half? ",
    [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "Is it kind?"}],
    [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "naïve café 東京 "}],
]


def random_request(rng: random.Random) -> Request:
    """A random seeded request, whose answer does not depend on other requests."""
    prompt = rng.choice(PROMPTS)
    if isinstance(prompt, str):
        prompt = f"{prompt}{rng.randrange(50)}"
    return Request(prompt, rng.choice(all_methods()), random_sampling(rng), trace=rng.random() < 0.7)


def random_sampling(rng: random.Random) -> SamplingParams:
    """Random parameters: length, greedy or sampled, stop conditions, biases, penalties and logprobs."""
    max_tokens = rng.choice((1, 2, 4, 4, 8, 8, 30))
    sampled_fields = {
        "temperature": rng.choice((0.3, 1.0, 2.0)),
        "top_k": rng.choice((0, 0, 40)),
        "top_p": rng.choice((1.0, 0.8)),
        "min_p": rng.choice((0.0, 0.05)),
        "n": rng.choice((1, 1, 1, 2, 3)),
    }
    extras: dict[str, Any] = {
        "stop": rng.choice((("e",), ("th", "東"), ("worm ",))),
        "stop_token_ids": (7, 41),
        "ignore_eos": True,
        "logprobs": rng.randrange(6),
        "min_tokens": max_tokens // 2,
        "logit_bias": {5: 3.0, 9: -1e30},
        "repetition_penalty": 1.2,
        "presence_penalty": 0.7,
        "include_stop_str_in_output": True,
    }
    fields = {name: extras[name] for name in extras if rng.random() < 0.15}
    if rng.random() < 0.5:
        fields |= sampled_fields
    return SamplingParams(max_tokens=max_tokens, seed=rng.randrange(1 << 32), **fields)
