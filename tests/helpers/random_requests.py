"""What is asked of an engine in tests of many requests: every method, short and long, with common heads."""

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
WISHES = [Objective(f"Be {word}.", 1 + at) for at, word in enumerate(WORDS)]
SYSTEM = "You are a helpful assistant. Your answer should be short, kind and true. " * 2


def methods() -> list[Method]:
    """Every method, with 0 to 8 wishes."""
    return [
        *(Mato(WISHES[:count]) for count in (1, 2, 3, 5, 8)),
        Base(),
        Prompt(WISHES[:1]),
        LinearAlignment(WISHES[:1]),
        ContextSteering(WISHES[:4]),
        Guidance(WISHES[1:2], kl_budget=0.3),
        Opad(WISHES[2:3]),
        Amulet(WISHES[:1]),
        Amulet(WISHES[3:4], kl_budget=0.05),
        Mixture(WISHES[:3]),
        Mato(WISHES[2:6], accumulate="ema", kl_budget=0.2),
        Mato(WISHES[4:6], accumulate="mean", placement="user"),
    ]


ASKS: list[Any] = [
    "Why?",
    "What happens if an earthworm is cut in half? ",
    [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "Is it kind?"}],
    [{"role": "system", "content": SYSTEM}, {"role": "user", "content": "naïve café 東京 "}],
]


def drawn(choose: random.Random) -> Request:
    """A request of any kind whose answer depends on nothing but itself."""
    ask = choose.choice(ASKS)
    if isinstance(ask, str):
        ask = f"{ask}{choose.randrange(50)}"
    return Request(ask, choose.choice(methods()), sampling(choose), trace=choose.random() < 0.7)


def sampling(choose: random.Random) -> SamplingParams:
    """Short and long, greedy and sampled, with every way to end, to ban and to report."""
    most = choose.choice((1, 2, 4, 4, 8, 8, 30))
    drawing = {
        "temperature": choose.choice((0.3, 1.0, 2.0)),
        "top_k": choose.choice((0, 0, 40)),
        "top_p": choose.choice((1.0, 0.8)),
        "min_p": choose.choice((0.0, 0.05)),
        "n": choose.choice((1, 1, 1, 2, 3)),
    }
    extras: dict[str, Any] = {
        "stop": choose.choice((("e",), ("th", "東"), ("worm ",))),
        "stop_token_ids": (7, 41),
        "ignore_eos": True,
        "logprobs": choose.randrange(6),
        "min_tokens": most // 2,
        "logit_bias": {5: 3.0, 9: -1e30},
        "repetition_penalty": 1.2,
        "presence_penalty": 0.7,
        "include_stop_str_in_output": True,
    }
    chosen = {name: extras[name] for name in extras if choose.random() < 0.15}
    if choose.random() < 0.5:
        chosen |= drawing
    return SamplingParams(max_tokens=most, seed=choose.randrange(1 << 32), **chosen)
