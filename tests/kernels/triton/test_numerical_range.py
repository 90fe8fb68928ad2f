"""Extreme settings and logits in the steering kernels, against the torch reference."""

from __future__ import annotations

import pytest
import torch
from trimtab.engine.methods.builtin import Amulet, ContextSteering, Mato
from trimtab.kernels.steering.sampling import RowSampling
from trimtab.kernels.steering.step import steer as reference
from trimtab.kernels.triton.steering.step import steer

from ..steering_harness import make_objectives
from .test_steering import GREEDY, SteeringCase, make_layout, random_logits, run_steps

pytestmark = pytest.mark.usefixtures("poisoned_memory")
VOCAB = 41
CASES = [
    SteeringCase(Mato(make_objectives(1e300, 1e-300))),
    SteeringCase(Mato(make_objectives(1.0, 2.0, 0.0), tau=1e-300), RowSampling(temperature=1e-5)),
    SteeringCase(Mato(make_objectives(*range(1, 16)), beta=1e8, tau=1e-300, kl_budget=0.2)),
    SteeringCase(
        Mato(make_objectives(5e-324, 1.0), beta=1e300, tau=1e300), RowSampling(temperature=1.0, top_p=1e-12)
    ),
    SteeringCase(
        ContextSteering(make_objectives(1.0, 2.0), strength=1000.0),
        RowSampling(temperature=1000.0, min_p=1.0),
    ),
    SteeringCase(Amulet(make_objectives(1.0), kl_budget=1e-12), GREEDY),
]


@pytest.mark.parametrize("scale", [1e-30, 1e18])
def test_extreme_settings_and_logits_give_finite_outputs_and_the_reference_weights(scale: float) -> None:
    layout = make_layout(CASES)
    rows = [scale * random_logits(layout, VOCAB, seed) for seed in (0, 1)]
    actual, expected = (run_steps(steer_fn, CASES, rows, VOCAB) for steer_fn in (steer, reference))
    for output, reference_output in zip(actual, expected, strict=True):
        assert not output.failed.any()
        values = (output.logprob, output.strength, output.kl, output.branch_logprobs, output.rewards)
        assert not any(value.isnan().any() for value in values)
        assert torch.allclose(output.weights, reference_output.weights, rtol=0, atol=1e-4)
