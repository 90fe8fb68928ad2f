"""Registrations of the steering kernels at the vocabulary sizes of Llama 3.1 and the demo model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from ..steering.closed_form import unrolled_loop
from ..steering.coefficients import SteeringCoefficients
from ..steering.layout import RequestLayout
from ..steering.masks import MASKS
from ..steering.sampling import RowSampling
from ..steering.state import SteeringState
from ..steering.step import steer
from . import roofline
from .spec import KernelCase, KernelSpec

LLAMA, DEMO = 128_256, 49_152
MATO = SteeringCoefficients(base_coef=-0.9347, objective_coef=1.9347, reward_rate=1.0)
TRIM = SteeringCoefficients(
    base_coef=-1.0, objective_coef=2.0, max_gain=4.0, control_rate=0.15, relative_top=0.1
)
KL_BOUNDED = SteeringCoefficients(base_coef=-4.6487, objective_coef=5.6487, reward_rate=1.0, kl_budget=0.2)
MASKED = SteeringCoefficients(
    base_coef=-2.0,
    objective_coef=3.0,
    **{name: value for mask in MASKS for name, value in mask.warmup.items()},
)
KL_BOUNDED_MASKED = replace(MASKED, kl_budget=0.2)
OPAD = SteeringCoefficients(base_coef=-1.0, objective_coef=2.0, prev_contrast_coef=1.0)
GREEDY, SAMPLED = RowSampling(), RowSampling(temperature=0.8, top_k=50, top_p=0.95, min_p=0.02, seed=1)


def _steer_case(
    num_requests: int,
    num_objectives: int,
    vocab_size: int,
    coefficients: SteeringCoefficients,
    sampling: RowSampling,
    dtype: torch.dtype,
) -> KernelCase:
    """A batch of requests with the same method and number of objectives."""
    num_rows = num_requests * (num_objectives + 1)

    def make(device: torch.device, generator: torch.Generator) -> tuple[Any, ...]:
        state = SteeringState(vocab_size, device)
        for row in range(num_requests):
            state.add_request(row, coefficients, [1 / num_objectives] * num_objectives, sampling)
        logits = 3 * torch.randn(num_rows, vocab_size, generator=generator)
        branches = range(num_objectives + 1)
        return (
            logits.to(device, dtype),
            RequestLayout.from_branches([(row, branches) for row in range(num_requests)], device),
            state,
        )

    kind = "sampled" if sampling.temperature else "greedy"
    return KernelCase(
        f"{num_requests} x {num_objectives + 1} of {vocab_size}, {kind}",
        make,
        roofline.steer(num_rows, vocab_size, dtype.itemsize),
    )


STEER = KernelSpec(
    "steer",
    steer,
    "steering.step.steer",
    (
        _steer_case(1, 4, LLAMA, MATO, GREEDY, torch.float32),
        _steer_case(1, 4, LLAMA, TRIM, GREEDY, torch.float32),
        _steer_case(16, 4, LLAMA, KL_BOUNDED, SAMPLED, torch.float32),
        _steer_case(16, 1, LLAMA, MASKED, SAMPLED, torch.bfloat16),
        _steer_case(16, 1, LLAMA, KL_BOUNDED_MASKED, GREEDY, torch.float32),
        _steer_case(4, 1, DEMO, OPAD, GREEDY, torch.float32),
    ),
)
INVARIANT_STEER = KernelSpec(
    "invariant_steer",
    steer,
    "steering.step.invariant_steer",
    (
        _steer_case(16, 4, LLAMA, KL_BOUNDED, SAMPLED, torch.float32),
        _steer_case(1, 1, DEMO, OPAD, GREEDY, torch.float32),
    ),
)


def _unrolled_loop_case(num_rows: int, vocab_size: int, dtype: torch.dtype) -> KernelCase:
    def make(device: torch.device, generator: torch.Generator) -> tuple[Any, ...]:
        base, anchor = (torch.randn(num_rows, vocab_size, generator=generator, dtype=dtype) for _ in range(2))
        return *(x.log_softmax(-1).to(device) for x in (base, anchor)), 2.0, 2.0, 10.0, 60

    return KernelCase(
        f"{num_rows} of {vocab_size}, 60 iterations",
        make,
        roofline.OpCost(3 * num_rows * vocab_size * dtype.itemsize),
    )


ITERATE = KernelSpec(
    "iterate",
    unrolled_loop,
    "unrolled_loop.unrolled_loop",
    (_unrolled_loop_case(1, LLAMA, torch.float32), _unrolled_loop_case(16, LLAMA, torch.float64)),
    atol=1e-3,  # sixty iterations in float32
    normalize=lambda scores: scores.log_softmax(-1),  # scores are defined up to a constant
)
