"""The kernels' specifications: real shapes, the vocabulary of Llama 3.1 and the demo's."""

from __future__ import annotations

from typing import Any

import torch

from ..steering.closed_form import literal_loop
from ..steering.coefficients import Program
from ..steering.state import Draw, Groups, SteerTable
from ..steering.step import steer as steer_reference
from ..triton.steering.step import invariant_steer, steer
from ..triton.unrolled_loop import iterate
from . import roofline
from .spec import Case, KernelSpec

LLAMA, DEMO = 128_256, 49_152
MATO = Program(base=-0.9347, scale=1.9347, reward=1.0)
NEAR = Program(base=-4.6487, scale=5.6487, reward=1.0, kl_budget=0.2)
MASKED = Program(base=-2.0, scale=3.0, mask_top_p=0.8)
OPAD = Program(base=-1.0, scale=2.0, delay=1.0)
GREEDY, SAMPLED = Draw(), Draw(temperature=0.8, top_k=50, top_p=0.95, min_p=0.02, seed=1)


def _steering(
    requests: int, objectives: int, vocab: int, program: Program, draw: Draw, dtype: torch.dtype
) -> Case:
    """Requests of one method and as many wishes, decoded together."""
    rows = requests * (objectives + 1)

    def make(device: torch.device, generator: torch.Generator) -> tuple[Any, ...]:
        table = SteerTable(vocab, device)
        for row in range(requests):
            table.admit(row, program, [1 / objectives] * objectives, draw)
        logits = 3 * torch.randn(rows, vocab, generator=generator)
        branches = range(objectives + 1)
        return (
            logits.to(device, dtype),
            Groups.of([(row, branches) for row in range(requests)], device),
            table,
        )

    kind = "sampled" if draw.temperature else "greedy"
    return Case(
        f"{requests} x {objectives + 1} of {vocab}, {kind}", make, roofline.steer(rows, vocab, dtype.itemsize)
    )


STEER = KernelSpec(
    "steer",
    steer_reference,
    steer,
    (
        _steering(1, 4, LLAMA, MATO, GREEDY, torch.float32),
        _steering(16, 4, LLAMA, NEAR, SAMPLED, torch.float32),
        _steering(16, 1, LLAMA, MASKED, SAMPLED, torch.bfloat16),
        _steering(4, 1, DEMO, OPAD, GREEDY, torch.float32),
    ),
)
INVARIANT_STEER = KernelSpec(
    "invariant_steer",
    steer_reference,
    invariant_steer,
    (
        _steering(16, 4, LLAMA, NEAR, SAMPLED, torch.float32),
        _steering(1, 1, DEMO, OPAD, GREEDY, torch.float32),
    ),
)


def _loop(rows: int, vocab: int, dtype: torch.dtype) -> Case:
    def make(device: torch.device, generator: torch.Generator) -> tuple[Any, ...]:
        base, anchor = (torch.randn(rows, vocab, generator=generator, dtype=dtype) for _ in range(2))
        return *(x.log_softmax(-1).to(device) for x in (base, anchor)), 2.0, 2.0, 10.0, 60

    return Case(f"{rows} of {vocab}, 60 iterations", make, roofline.Work(3 * rows * vocab * dtype.itemsize))


ITERATE = KernelSpec(
    "iterate", literal_loop, iterate, (_loop(1, LLAMA, torch.float32), _loop(16, LLAMA, torch.float64))
)
