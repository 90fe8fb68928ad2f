"""Sample methods and sampling parameters for engine tests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
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
    SamplingParams,
)

if TYPE_CHECKING:
    from trimtab.engine import Method
    from trimtab.engine.outputs import Output

KIND, SHORT = Objective("Your answer should be kind.", 3), Objective("Your answer should be short.", 1)
TRUE, ODD = Objective("Be true.", 0.25), Objective("東京 café!", 2)
QUESTION = "What happens if an earthworm is cut in half?"
METHODS: list[Method] = [
    Base(),
    Prompt([KIND]),
    LinearAlignment([KIND]),
    ContextSteering([KIND, SHORT]),
    Guidance([KIND], kl_budget=0.3),
    Opad([KIND]),
    Amulet([KIND]),
    Amulet([KIND], kl_budget=0.05),
    Mato([KIND, SHORT]),
    Mato([KIND, SHORT, TRUE, ODD], accumulate="ema"),
    Mato([KIND, Objective("Be rude.", 0), SHORT], kl_budget=0.2, accumulate="mean", beta=2.0),
    Mixture([KIND, SHORT, ODD]),
]


def method_id(param: object) -> str:
    return f"{param.name}-{len(param.objectives)}" if hasattr(param, "objectives") else str(param)


parametrize_methods = pytest.mark.parametrize("method", METHODS, ids=method_id)


def sampled_params(seed: int, max_tokens: int = 20, **fields: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=1.0, seed=seed, ignore_eos=True, **fields)


def greedy_params(max_tokens: int = 20, **fields: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, **fields)


def prompt_ids(output: Output) -> list[list[int]]:
    return [branch.prompt_token_ids for branch in output.branches]
