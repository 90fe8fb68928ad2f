"""Numbers at the ends of their range, in the kernels as in the torch references."""

from __future__ import annotations

import pytest
import torch
from trimtab.engine.methods.builtin import Amulet, ContextSteering, Mato
from trimtab.kernels.steering.state import Draw
from trimtab.kernels.steering.step import steer as reference
from trimtab.kernels.triton.steering.step import steer

from ..steering_harness import wishes
from .test_steering import GREEDY, Request, layout, logits_of, steps_of

pytestmark = pytest.mark.usefixtures("poisoned_memory")
VOCAB = 41
REQUESTS = [
    Request(Mato(wishes(1e300, 1e-300))),
    Request(Mato(wishes(1.0, 2.0, 0.0), tau=1e-300), Draw(temperature=1e-5)),
    Request(Mato(wishes(*range(1, 16)), beta=1e8, tau=1e-300, kl_budget=0.2)),
    Request(Mato(wishes(5e-324, 1.0), beta=1e300, tau=1e300), Draw(temperature=1.0, top_p=1e-12)),
    Request(ContextSteering(wishes(1.0, 2.0), strength=1000.0), Draw(temperature=1000.0, min_p=1.0)),
    Request(Amulet(wishes(1.0), kl_budget=1e-12), GREEDY),
]


@pytest.mark.parametrize("scale", [1e-30, 1e18])
def test_settings_and_logits_of_any_size_give_numbers_and_the_weights_of_the_reference(scale: float) -> None:
    groups = layout(REQUESTS)
    rows = [scale * logits_of(groups, VOCAB, seed) for seed in (0, 1)]
    ours, theirs = (steps_of(how, REQUESTS, rows, VOCAB) for how in (steer, reference))
    for choice, right in zip(ours, theirs, strict=True):
        assert not choice.failed.any()
        said = (choice.logprob, choice.strength, choice.kl, choice.branch_logprobs, choice.rewards)
        assert not any(numbers.isnan().any() for numbers in said)
        assert torch.allclose(choice.weights, right.weights, rtol=0, atol=1e-4)
