"""Registration of the fused LM head and steering kernel, at the shapes of Llama 3.1 8B and the demo model."""

from __future__ import annotations

from typing import Any

import torch

from .. import lm_head
from ..steering.coefficients import SteeringCoefficients
from ..steering.layout import RequestLayout
from ..steering.sampling import RowSampling
from ..steering.state import SteeringState
from ..steering.step import SamplerOutput
from ..triton.lm_head.plan import FusedPlan
from .roofline import OpCost
from .spec import KernelCase, KernelSpec, random_weight

LLAMA, DEMO = (128_256, 4096), (49_152, 576)
"""(vocab_size, hidden_size) of an LM head."""
BASE, AMULET = SteeringCoefficients(), SteeringCoefficients(base_coef=-4.6487, objective_coef=5.6487)
TRIM = SteeringCoefficients(base_coef=-1.0, objective_coef=2.0, max_gain=4.0, control_rate=0.15)
MATO = SteeringCoefficients(base_coef=-0.9347, objective_coef=1.9347, reward_rate=1.0)
KL_BOUNDED = SteeringCoefficients(base_coef=-4.6487, objective_coef=5.6487, reward_rate=1.0, kl_budget=0.2)
GREEDY, SAMPLED = RowSampling(), RowSampling(temperature=0.8, seed=1)
TRUNCATED = RowSampling(temperature=0.8, min_p=0.05, seed=1)


def fused_case(
    head_shape: tuple[int, int],
    num_requests: int,
    num_objectives: int,
    coefficients: SteeringCoefficients,
    sampling: RowSampling,
    *,
    trace: bool = False,
) -> KernelCase:
    """Requests with the same method and number of objectives, in bfloat16."""
    vocab_size, hidden_size = head_shape
    num_rows = num_requests * (num_objectives + 1)

    def make_state(device: torch.device) -> tuple[RequestLayout, SteeringState]:
        state = SteeringState(vocab_size, device)
        for row in range(num_requests):
            state.add_request(
                row, coefficients, [1 / num_objectives for _ in range(num_objectives)], sampling
            )
        return RequestLayout.from_branches(
            [(row, range(num_objectives + 1)) for row in range(num_requests)], device
        ), state

    def make(device: torch.device, generator: torch.Generator) -> tuple[Any, ...]:
        hidden = torch.randn(num_rows, hidden_size, generator=generator)
        weight = random_weight(vocab_size, hidden_size, device, torch.bfloat16)
        return hidden.to(device, torch.bfloat16), weight, *make_state(device), None, trace

    layout, state = make_state(torch.device("cpu"))
    plan = FusedPlan.from_features(
        state.features(layout), layout, state, trace=trace, top=False, has_edits=False
    )
    assert plan is not None, "the fused kernel does not support this case"
    kind = {GREEDY: "greedy", SAMPLED: "drawn", TRUNCATED: "filtered"}[sampling]
    traced = ", traced" if trace else ""
    name = f"{num_requests} x {num_objectives + 1} of {vocab_size} x {hidden_size}, {kind}{traced}"
    num_bytes = plan.bytes_moved(num_rows, vocab_size, hidden_size, torch.bfloat16.itemsize)
    return KernelCase(name, make, OpCost(num_bytes, plan.flops(num_rows, vocab_size, hidden_size)))


def _reference(*args: Any) -> SamplerOutput:
    *inputs, trace = args
    return lm_head.lm_head_steer(*inputs, trace=trace)


def _launch(*args: Any) -> SamplerOutput:
    from ..triton.lm_head.launch import lm_head_steer  # noqa: PLC0415 - imports triton

    *inputs, trace = args
    return lm_head_steer(*inputs, trace=trace)


LM_HEAD_STEER = KernelSpec(
    "lm_head_steer",
    _reference,
    _launch,
    (
        fused_case(LLAMA, 1, 4, MATO, GREEDY),
        fused_case(LLAMA, 1, 4, KL_BOUNDED, GREEDY, trace=True),
        fused_case(LLAMA, 8, 4, MATO, SAMPLED),
        fused_case(LLAMA, 8, 4, TRIM, SAMPLED),
        fused_case(LLAMA, 16, 1, AMULET, SAMPLED),
        fused_case(LLAMA, 16, 1, AMULET, TRUNCATED),
        fused_case(LLAMA, 64, 1, AMULET, GREEDY),
        fused_case(DEMO, 8, 2, MATO, GREEDY),
        fused_case(DEMO, 4, 0, BASE, GREEDY, trace=True),
    ),
    has_float64=False,  # the vendor's matmul gives float32 logits
)
